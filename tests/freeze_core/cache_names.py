"""The argument by which transformers' models take a cache, and the cache they return: renamed in transformers 5.24."""

from __future__ import annotations

import inspect

from transformers import Cache, LlamaForCausalLM

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def cache_of(output):
    """The cache among what a model returned."""
    return next(value for value in output.values() if isinstance(value, Cache))
