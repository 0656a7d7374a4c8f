"""What modules take and give when a model runs on drawn tokens: from it, who reads what is told without names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.attention.probed import left_alone
from freeze_core.errors import InterventionError
from freeze_core.inputs import model_arguments, run, vocabulary_size

__all__ = ["Flow", "arguments_of", "device_of", "drawn_tokens", "observed", "same", "source_of", "undisturbed"]

TOKENS = 8
"""On which modules are observed."""


class Flow(NamedTuple):
    """What a module took, each of its floating tensors `[token, features]`, and what it gave, in the model's dtype."""

    taken: tuple[Tensor, ...]
    given: Tensor


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the model in eval mode, with gradients where something asks for them, and leaves it as it was."""
    with (
        torch.inference_mode(False),
        left_alone(model),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),  # what is compiled would be compiled anew to be listened to
    ):
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module takes its tokens: where its first parameter lies that is not loaded as it is used."""
    return next((one.device for one in module.parameters() if not one.is_meta), torch.device("cpu"))


def drawn_tokens(model: nn.Module, rows: int, tokens: int) -> dict[str, Any]:
    """The arguments of a pass on drawn tokens `[rows, tokens]`, the same each time."""
    generator = torch.Generator().manual_seed(0)
    words = vocabulary_size(model)
    if words is None:
        raise InterventionError(
            f"{type(model).__name__} has no config that says vocab_size, so that no tokens are drawn"
        )
    return arguments_of(model, torch.randint(words, (rows, tokens), generator=generator).to(device_of(model)))


def arguments_of(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """The arguments of a pass on token ids `[row, token]`: of an encoder and a decoder, both on the same."""
    arguments = model_arguments(model, ids)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids
    return arguments


def observed(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, Flow]:
    """The flow of each of `modules` that runs, in the order in which they first gave something.

    Of one that runs several times, the last run.
    """
    flows: dict[nn.Module, Flow] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(given, Tensor) and given.is_floating_point() and given.dim() > 1:
            taken = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1)
            floating = tuple(_rows(value) for value in taken if value.is_floating_point())
            flows[module] = Flow(floating, _rows(given))

    with ExitStack() as stack, undisturbed(model), torch.no_grad():
        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        run(model, drawn_tokens(model, 1, TOKENS))
    return flows


def _rows(value: Tensor) -> Tensor:
    # Of a DTensor this process's own part: what a module takes or gives when it is called by itself here.
    own: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return own.detach().flatten(0, -2).clone()


def source_of(taken: Tensor, flows: Mapping[nn.Module, Flow]) -> nn.Module | None:
    """The first of the modules that gave what was `taken`, and took something else."""
    for module, flow in flows.items():
        if same(flow.given, taken) and flow.taken and not same(flow.taken[0], taken):
            return module
    return None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers."""
    return one.shape == other.shape and torch.equal(one.to(other.device), other)
