"""Prompts of two kinds, vectors found on them, and by hand what they are found from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from freeze_core import ExperimentalInterventions

DEFAULT = ["gpt2", "llama", "mistral_gqa", "falcon_mqa"]
METHODS = ["mean_difference", "principal_component", "optimised"]
GENERATOR = torch.Generator().manual_seed(0)
POSITIVE, NEGATIVE = torch.randint(0, 60, (2, 10, 7), generator=GENERATOR)
MASK = (torch.arange(7) >= torch.arange(10)[:, None] % 5).long()
METRIC = {"metric": "logit_difference", "targets": (3, 4)}


def discover(model: Any, positive: Any = POSITIVE, negative: Any = NEGATIVE, *args: Any, **options: Any) -> Any:
    layer, *rest = args or (1,)
    if "optimised" in rest:
        options = {**METRIC, "steps": 5, **options}
    return ExperimentalInterventions().discover_intervention_vector(
        model, positive, negative, layer, *rest, **{"progress": False, "resamples": 999} | options
    )


def rows(size: int = 10, held_out: int = 5, seed: int = 0) -> tuple[list[int], list[int]]:
    """The rows to find a vector on, and those held out, as they are drawn."""
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(drawn[held_out:]), sorted(drawn[:held_out])


def stream(model: Any, layer: int, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The residual stream at the last real token of each row, read one row at a time, in float64."""
    layers = next(one for one in model.modules() if isinstance(one, nn.ModuleList))
    found = []
    for row, one in enumerate(ids):
        real = one if mask is None else one[mask[row].bool()]
        with torch.no_grad():
            states = model(real[None], output_hidden_states=True).hidden_states
            if layer < len(layers) - 1:
                found.append(states[layer + 1][0, -1])
                continue
            before = states[-2]  # the last one is after the final norm
            seen: list[Tensor] = []
            norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
            hook = norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            model(real[None])
            hook.remove()
            assert not torch.equal(before, seen[0])
            found.append(seen[0][0, -1])
    return torch.stack(found).double()


def rounding(values: Tensor) -> float:
    """float32 products of 32 features, four layers deep."""
    return float(32 * 4 * 2**-23 * values.abs().max())


class Words:
    """A tokenizer whose words are numbers, and which pads on the left."""

    pad_token: str | None = "0"

    def __call__(self, texts: list[str], padding: bool, return_tensors: str) -> dict[str, Tensor]:
        several = [[int(word) for word in text.split()] for text in texts]
        width = max(map(len, several))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in several])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in several])
        return {"input_ids": ids, "attention_mask": mask}
