"""What each layer gave in the clean pass, and the actions by which layers give it again in later passes.

Everything else of the model runs as ever: its embeddings, masks, positions and hooks are its own. What a layer returns
has to be all that later ones read of it; `freeze_core.scoring.shortcuts` finds out whether that is so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.errors import InterventionError
from freeze_core.generators import Generators
from freeze_core.scoring.patched_calls import Action, run_module

__all__ = ["LayerCache", "RecordLayer", "layers_of", "negate_inputs", "parts_of", "refuse_run"]


def layers_of(model: nn.Module, sites: Sites) -> list[nn.Module]:
    """The modules of the layers, each once and in order; empty where they are not one list of different modules."""
    parts = next(iter(sites.names.values())).split(".")
    for depth in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        if isinstance(module, nn.ModuleList):
            layers = list(module)
            return layers if len(set(layers)) == len(layers) == sites.layers else []
    return []


class RecordLayer:
    """Runs a layer, and keeps what it gave and, if it drew, the states that it left torch's generators in."""

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self._states_after: list[Tensor] | None = None
        self.runs = 0
        self.output: Any = None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._generators.states()
        self.output = forward(*args, **kwargs)
        self._states_after = self._generators.states() if self._generators.drew(before) else None
        self.runs += 1
        return self.output

    def replay(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The action that gives the output again. What comes after it draws what it drew in the clean pass."""
        if self._states_after is not None:
            self._generators.put(self._states_after)
        return self.output

    @property
    def can_be_replayed(self) -> bool:
        """Whether the layer ran once, and gave only tensors."""
        return self.runs == 1 and all(part is None or isinstance(part, Tensor) for part in parts_of(self.output))


class GiveRows:
    """Gives several outputs of a layer as those of the rows of one batch, in place of running it."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self._outputs = outputs

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        columns = zip(*map(parts_of, self._outputs), strict=True)
        parts = tuple(column[0] if column[0] is None else torch.cat(column) for column in columns)
        return parts if type(self._outputs[0]) is tuple else parts[0]


class LayerCache:
    """The recorded layers of one batch. Its methods give the action of each layer for one kind of pass."""

    def __init__(self, records: Sequence[RecordLayer]) -> None:
        self.records = records
        self._replays: list[Action] = [record.replay for record in records]

    def starting_at(self, layer: int) -> list[Action]:
        """Layers before `layer` are not run; with the number of layers, none is."""
        return [*self._replays[:layer], *[run_module] * (len(self.records) - layer)]

    def running_only(self, layer: int, action: Action) -> list[Action]:
        """`layer` takes `action`, the others are not run."""
        return [*self._replays[:layer], action, *self._replays[layer + 1 :]]

    def continuing_from(self, layer: int, outputs: Sequence[Any]) -> list[Action]:
        """For a batch of several copies: `layer` gives one of `outputs` for each copy, and those behind it are run."""
        earlier = [GiveRows([record.output] * len(outputs)) for record in self.records[:layer]]
        return [*earlier, GiveRows(outputs), *[run_module] * (len(self.records) - layer - 1)]


def refuse_run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The action of a layer between the passes of a sweep, whose outputs are shared by later ones."""
    raise InterventionError(
        "the model that is scored was run by something else during the sweep, the metric say, while parts of it give "
        "what they gave before: compute what the metric needs of the model beforehand, or give the metric a copy of "
        "the model"
    )


def negate_inputs(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The action that runs a layer on other states `[batch, token, hidden]`, and on all else as it is."""

    def negated(value: Any) -> Any:
        is_states = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
        return -value if is_states else value

    return forward(*map(negated, args), **{name: negated(value) for name, value in kwargs.items()})


def parts_of(output: Any) -> tuple[Any, ...]:
    """What a layer gave, as a tuple."""
    return output if type(output) is tuple else (output,)
