"""Which claims must say something about which models, so that none can drop out of a run unseen.

A claim that finds nothing to say about a model is "n/a". For most architectures that is a fact about them. About the
architectures that a run takes by default every shipped claim says something, so that "n/a" there means that the judge
has lost a claim: another library may have renamed what it looks for.
"""

from __future__ import annotations

from pytest_circuitfreeze.engines import FreezeCore

__all__ = ["lost_claim"]

ALL_CLAIMS_APPLY = ("gpt2", "llama", "mistral_gqa", "falcon_mqa")
"""Architectures about which each shipped claim says something."""


def lost_claim(model: str | None, engine: str, reason: str) -> str:
    """Why a shipped claim that says nothing about `model`, for this `reason`, fails; empty where it may say nothing.

    Of other engines than our own it may: some claims are about what `freeze_core` alone has, such as recordings.
    """
    if not reason or model not in ALL_CLAIMS_APPLY or engine != FreezeCore.name:
        return ""
    return (
        f"this claim must apply to {model}, and was found not to: {reason}. The judge relies on something that has "
        "changed: compare the installed torch and transformers with the versions that were run"
    )
