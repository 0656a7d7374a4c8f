"""Caches that are not a freeze's own, and what is said of them when they are used under it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from pytest_circuitfreeze.suites.judge.judged_sites import ROLES
from pytest_circuitfreeze.suites.judge.oracle import chosen_heads
from pytest_circuitfreeze.suites.judge.site_lookup import sites

if TYPE_CHECKING:
    from freeze_core import InterventionConfig

__all__ = ["other_freezes", "told"]


def other_freezes(model: PreTrainedModel, config: InterventionConfig) -> dict[str, InterventionConfig]:
    """Freezes that differ from `config` in strength, circuit, heads, replacement or seed, by what that is.

    Those that touch other activations have the scope `group`: they keep KV heads as they are, which more engines offer.
    """
    touched = _touched(model, config)
    shared = replace(config, kv_scope="group")
    elsewhere = {
        "another circuit": replace(shared, circuit="q" if config.circuit in ("ov", "v") else "v"),
        "other heads": replace(shared, head_indices=_other_heads(model, config)),
    }
    found = {name: one for name, one in elsewhere.items() if _touched(model, one) != touched}
    found["half the strength"] = replace(config, strength=config.strength / 2)
    plain = replace(config, statistics=None, noise_std=None)
    if config.freeze_type == "zero":
        found["noise"] = replace(plain, freeze_type="noise", noise_std=1.0)
    else:
        found["zeros"] = replace(plain, freeze_type="zero")
    if config.freeze_type == "noise" and config.noise_std != 0:
        found["another seed"] = replace(config, seed=config.seed + 1)
    return found


def _other_heads(model: PreTrainedModel, config: InterventionConfig) -> list[int]:
    """The query heads that `config` does not name; where it names all, the first."""
    known = sites(model).values()
    named = [set(chosen_heads(site, replace(config, circuit="q"), "q")) for site in known]
    return sorted(set(range(min(site.heads for site in known))).difference(*named)) or [0]


def _touched(model: PreTrainedModel, config: InterventionConfig) -> list[list[int]]:
    """The heads whose activations a freeze touches, by layer and activation."""
    return [chosen_heads(site, config, role) for site in sites(model).values() for role in ROLES]


def told(run: Callable[[], object]) -> str:
    """What `run` says of the cache that it uses: which warning or error, and its text; nothing where it is silent."""
    from freeze_core import CircuitFreezeError, StaleCacheWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except CircuitFreezeError as error:
            return f"CircuitFreezeError: {error}"
        except Exception as error:  # an error, but none that says what is wrong
            return f"{type(error).__name__}: {error}"
    stale = [warning.message for warning in caught if issubclass(warning.category, StaleCacheWarning)]
    return f"StaleCacheWarning: {stale[0]}" if stale else ""
