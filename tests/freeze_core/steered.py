"""Any vector of a model, the same added by a hook by hand, and what is on a model before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from freeze_core import AttentionCircuitFreezer, ExperimentalInterventions, InterventionVector

FREEZER = AttentionCircuitFreezer()
DEFAULT = ["gpt2", "llama", "mistral_gqa", "falcon_mqa"]  # the layers of the last give tuples
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = torch.randint(0, 60, (8, 7), generator=GENERATOR)
IDS = torch.randint(0, 60, (3, 7), generator=GENERATOR)
LEFT = (torch.arange(7) >= torch.tensor([[0], [2], [4]])).long()
RIGHT = (torch.arange(7) < torch.tensor([[7], [5], [3]])).long()


def vector_of(model: Any, layer: int = 1, seed: int = 1) -> InterventionVector:
    """Any vector of a model: what is tested here is how it is added."""
    found = ExperimentalInterventions().discover_intervention_vector(
        model, PROMPTS[:4], PROMPTS[4:], layer, resamples=100, progress=False
    )
    drawn = torch.randn(len(found.vector), generator=torch.Generator().manual_seed(seed), dtype=found.vector.dtype)
    return replace(found, vector=drawn)


def logits(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **given).logits


def by_hand(model: Any, layer: int, add: Callable[[Tensor], Tensor], **given: Any) -> Tensor:
    """The logits of a pass in which a forward hook changes the stream after a layer."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)

    layers = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
    handle = layers[layer].register_forward_hook(hook)
    found = logits(model, **given)
    handle.remove()
    return found


def state(model: Any) -> list[Any]:
    """All that is on a model's modules, by name and identity."""
    kept = []
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        several = {key: [*map(id, value.values())] for key, value in vars(module).items() if isinstance(value, dict)}
        kept.append((name, attributes, several))
    return kept
