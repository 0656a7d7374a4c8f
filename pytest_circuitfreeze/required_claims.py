"""Which claims must apply to which models, so that none can drop out of a run unnoticed.

A claim that does not apply to a model is reported as "n/a". For most architectures that is a fact about them. To the
architectures of the default run every shipped claim applies. "n/a" there means that the judge has lost a claim: another
library may have renamed what it looks for.
"""

from __future__ import annotations

from pytest_circuitfreeze.engines import FreezeCore

__all__ = ["lost_claim"]

ALL_CLAIMS_APPLY = ("gpt2", "llama", "mistral_gqa", "falcon_mqa")
"""Architectures to which every shipped claim applies."""


def lost_claim(model: str | None, engine: str, reason: str) -> str:
    """Why a shipped claim that does not apply to `model` fails; empty where it need not apply.

    It need not for other engines than our own: some claims are about what `freeze_core` alone has, such as recordings.

    Args:
        model: the architecture, `None` for a claim without a model.
        engine: the engine's name.
        reason: why the claim does not apply; empty if it does.
    """
    if not reason or model not in ALL_CLAIMS_APPLY or engine != FreezeCore.name:
        return ""
    return (
        f"this claim must apply to {model}, and was found not to: {reason}. The judge relies on something that has "
        "changed: compare the installed torch and transformers with the versions that were run"
    )
