"""Layers that stand in for themselves with what they gave in the clean pass, so that a pass starts after them.

Everything else of the model runs as ever: its embeddings, masks, positions and hooks are its own. What a layer gives is
all that later ones may read of it; `CachedLayers.hand_on_all` finds out whether that is so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.errors import CircuitFreezeError, InterventionError
from freeze_core.forward_patch import ForwardPatch
from freeze_core.generators import Generators

__all__ = ["FAULTS", "CachedLayers", "close", "layers_of"]

FAULTS = (CircuitFreezeError, LookupError, TypeError, RuntimeError)
"""What a pass may raise that lacks something of the layers that it leaves out."""


def layers_of(model: nn.Module, sites: Sites) -> list[nn.Module]:
    """The modules of the layers, each once and in order; none where they are not one list of different modules."""
    parts = next(iter(sites.names.values())).split(".")
    for depth in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        if isinstance(module, nn.ModuleList):
            layers = list(module)
            return layers if len(set(layers)) == len(layers) == sites.layers else []
    return []


def close(found: Tensor, expected: Tensor, bound: float) -> bool:
    """Whether two tensors are the same to `bound` of the largest finite value; nan only where both are."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(found, expected):
        return True
    if not found.is_floating_point():
        return False
    scale = float(torch.where(expected.isfinite(), expected, 0).abs().max())
    return torch.allclose(found, expected, rtol=0, atol=bound * scale, equal_nan=True)


class CachedLayer(ForwardPatch):
    """Stands in for the forward of a layer: runs it, or gives what it gave before."""

    def __init__(self, module: nn.Module, generators: Generators, owner: CachedLayers) -> None:
        super().__init__(module)
        self._owner = owner
        self._generators = generators
        self.output: Any = None
        self._after: list[Tensor] | None = None
        self.doing: Literal["run", "record", "give", "compare", "upset", "keep", "stand"] = "run"
        self.runs = 0
        self.alike = False
        self.kept: Any = None
        self.copies: Sequence[Any] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._owner.shares_work and not self._owner.in_pass:
            raise InterventionError(
                "the model that is scored was run by something else during the sweep, the metric say, while parts of "
                "it give what they gave before: compute what the metric needs of the model beforehand, or give the "
                "metric a copy of the model"
            )
        if self.doing == "give":
            return self._give()
        if self.doing == "stand":
            return _stacked(self.copies)
        if self.doing == "upset":
            given = {name: _negated(value) for name, value in kwargs.items()}
            return self.original(*(_negated(value) for value in args), **given)
        before = self._generators.states() if self.doing == "record" else []
        output = self.original(*args, **kwargs)
        if self.doing == "record":
            self.runs += 1
            self.output = output
            self._after = self._generators.states() if self._generators.drew(before) else None
        elif self.doing == "compare":
            self.alike = _alike(output, self.output)
            return self._give()
        elif self.doing == "keep":
            self.kept = output
        return output

    def _give(self) -> Any:
        if self._after is not None:  # what comes after draws what it drew in the clean pass
            self._generators.put(self._after)
        return self.output

    def taken(self) -> Any:
        """What was kept, once."""
        kept, self.kept = self.kept, None
        return kept

    @property
    def gives(self) -> bool:
        """Whether it ran once, and gave only tensors."""
        return self.runs == 1 and all(one is None or isinstance(one, Tensor) for one in _parts(self.output))


class CachedLayers:
    """The layers of one model during the sweep over one batch."""

    def __init__(self, layers: Sequence[nn.Module], generators: Generators) -> None:
        self.shares_work = False
        self.in_pass = False
        self._layers = [CachedLayer(layer, generators, self) for layer in layers]

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Stands in for the layers."""
        with ExitStack() as stack:
            for layer in self._layers:
                layer.attach()
                stack.callback(layer.detach)
            yield

    @contextmanager
    def own_pass(self) -> Iterator[None]:
        """A pass of the sweep runs: in no other one may the layers stand in for themselves."""
        self.in_pass = True
        try:
            yield
        finally:
            self.in_pass = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what the layers give."""
        with self._doing(["record"] * len(self._layers)):
            yield

    @contextmanager
    def starting_at(self, layer: int) -> Iterator[None]:
        """Passes start at `layer`: those before it are not run."""
        later = len(self._layers) - layer
        with self._doing(["give"] * layer + ["run"] * later):
            yield

    @contextmanager
    def only(self, layer: int) -> Iterator[Callable[[], Any]]:
        """Passes run `layer` alone; the others give what they gave. What is yielded tells what it gave in the last."""
        doing: list[Any] = ["give"] * len(self._layers)
        doing[layer] = "keep"
        with self._doing(doing):
            yield self._layers[layer].taken

    @contextmanager
    def behind(self, layer: int, outputs: Sequence[Any]) -> Iterator[None]:
        """Passes over several copies of the batch start behind `layer`, which gives `outputs`, one for each copy."""
        several = [[before.output] * len(outputs) for before in self._layers[:layer]] + [list(outputs)]
        for one, copies in zip(self._layers, several, strict=False):
            one.copies = copies
        try:
            with self._doing(["stand"] * (layer + 1) + ["run"] * (len(self) - layer - 1)):
                yield
        finally:
            for one in self._layers:
                one.copies = ()

    def clean(self, layer: int) -> Any:
        """What `layer` gave in the clean pass."""
        return self._layers[layer].output

    @contextmanager
    def upsetting(self) -> Iterator[None]:
        """Every layer reads other states: whatever is kept behind the layers' backs is another then."""
        with self._doing(["upset"] * len(self._layers)):
            yield

    def hand_on_all(self, run: Callable[[], object]) -> bool:
        """Whether each layer gives what it gave in the clean pass when it alone is run.

        Not so where layers read something of others that these do not give them (keys and values of an earlier layer,
        say), keep something from one pass for the next, or write to what they are given. Such things are upset first;
        the last layer is then looked at first, before earlier ones are put right.
        """
        if not all(layer.gives for layer in self._layers):
            return False
        try:
            with self.upsetting():
                run()
            for number, layer in reversed(list(enumerate(self._layers))):
                doing: list[Any] = ["give"] * len(self._layers)
                doing[number] = "compare"
                with self._doing(doing):
                    run()
                if not layer.alike:
                    return False
        except torch.OutOfMemoryError:
            raise
        except FAULTS:
            return False
        return True

    @contextmanager
    def _doing(self, what: Sequence[Any]) -> Iterator[None]:
        before = [layer.doing for layer in self._layers]
        for layer, doing in zip(self._layers, what, strict=True):
            layer.doing = doing
        try:
            yield
        finally:
            for layer, doing in zip(self._layers, before, strict=True):
                layer.doing = doing


def _parts(output: Any) -> tuple[Any, ...]:
    return output if type(output) is tuple else (output,)


def _stacked(outputs: Sequence[Any]) -> Any:
    """Several outputs of one layer as that of rows one below the other."""
    parts = [one[0] if one[0] is None else torch.cat(one) for one in zip(*map(_parts, outputs), strict=True)]
    return tuple(parts) if type(outputs[0]) is tuple else parts[0]


def _tensors(output: Any) -> list[Tensor]:
    return [one for one in _parts(output) if isinstance(one, Tensor)]


def _alike(output: Any, before: Any) -> bool:
    found, expected = _tensors(output), _tensors(before)
    return len(found) == len(expected) and all(
        close(one, other, 16 * torch.finfo(other.dtype).eps if other.is_floating_point() else 0)
        for one, other in zip(found, expected, strict=True)
    )


def _negated(value: Any) -> Any:
    """Other states `[batch, token, hidden]`; anything else as it is."""
    states = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return -value if states else value
