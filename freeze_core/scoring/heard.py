"""What the heads of each layer put out in one pass, z, heard at the output projection, and put back behind it.

Under a freeze each attention runs from the states of the clean pass and is heard, and hands on what it gave in the
clean pass: so one pass under freezes of all layers tells of each layer what its own freeze does to its z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor

from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.shards import gathered, sharded_like
from freeze_core.errors import UnsupportedModelError
from freeze_core.forward_patch import ForwardPatch

__all__ = ["Heads"]


class Output(ForwardPatch):
    """Stands in for the forward of an output projection, beneath a freeze: hears its input z, once a run."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__(site.layout.output)
        self._site = site
        self.hears = False
        self.z: list[Tensor] = []
        self.instead: Sequence[Tensor] = ()

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = z
        z = gathered(given, f"z of {self._site.name}")
        width = self._site.layout.z.numel()
        if z.shape[-1] != width:
            raise UnsupportedModelError(
                f"z of {self._site.name} has {z.shape[-1]} features where {width} were expected: under tensor "
                "parallelism a process sees its own heads only; use method='exact'"
            )
        if self.hears:
            if self.instead:
                z = self.instead[len(self.z)]
            if not z.requires_grad:
                z = z.detach().requires_grad_()
            self.z.append(z)
        return self.original(sharded_like(z, given), *args, **kwargs)


class Attention(ForwardPatch):
    """Stands in for the forward of an attention, beneath a freeze: keeps what it gives, or gives what was kept."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__(site.attention)
        self._site = site
        self.doing: Literal["run", "keep", "give"] = "run"
        self.kept: list[Tensor] = []
        self.given = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        if self.doing == "run":
            return output
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                f"{self._site.name} gives a {type(first).__name__} where a tensor was expected: use method='exact'"
            )
        if self.doing == "keep":
            self.kept.append(first.detach().clone())  # what comes after may write to it
            return output
        first = self.kept[self.given].clone()
        self.given += 1
        return first if rest is None else (first, *rest)


class Heads:
    """The heads of the layers at `sites`, by layer, in passes over one batch: each pass tells every run of a layer."""

    def __init__(self, sites: Mapping[int, AttentionSite]) -> None:
        self._outputs = {layer: Output(site) for layer, site in sites.items()}
        self._attentions = {layer: Attention(site) for layer, site in sites.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Stands in for the attentions and their output projections."""
        with ExitStack() as stack:
            for one in (*self._outputs.values(), *self._attentions.values()):
                one.attach()
                stack.callback(one.detach)
            yield

    def clean(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """What the clean pass `run` gives, and the z of each layer's runs, which take gradients."""
        return self._pass(run, "keep", self._outputs)

    def frozen(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """What a pass gives under freezes that reach no further than z, and the z of each layer under its own."""
        logits, z = self._pass(run, "give", self._outputs)
        return logits, {layer: [one.detach() for one in runs] for layer, runs in z.items()}

    def replaced(self, layer: int, z: Sequence[Tensor], run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What an unfrozen pass gives with `z` in the place of that of each run of `layer`, and this z as a leaf."""
        self._outputs[layer].instead = z
        try:
            logits, heard = self._pass(run, "run", [layer])
        finally:
            self._outputs[layer].instead = ()
        return logits, heard[layer]

    def _pass(
        self, run: Callable[[], Tensor], doing: Literal["run", "keep", "give"], layers: Iterable[int]
    ) -> tuple[Tensor, dict[int, list[Tensor]]]:
        for layer, attention in self._attentions.items():
            attention.doing, attention.given = doing, 0
            self._outputs[layer].z, self._outputs[layer].hears = [], layer in layers
        try:
            logits = run()
            return logits, {layer: self._outputs[layer].z for layer in layers}
        finally:  # a backward pass may run a layer again
            for layer, attention in self._attentions.items():
                attention.doing = "run"
                self._outputs[layer].z, self._outputs[layer].hears = [], False
