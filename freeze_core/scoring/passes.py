"""The passes over one batch: the clean one, and one for each freeze, which starts where the freeze is if it can."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.errors import InterventionError
from freeze_core.freezing.install import install
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, run
from freeze_core.scoring.batches import Batch, copied
from freeze_core.scoring.known_code import foreign_code
from freeze_core.scoring.prefix import FAULTS, CachedLayers, close, layers_of
from freeze_core.scoring.remembered import remembering
from freeze_core.scoring.stacked import Stacked, Under, stacks, written
from freeze_core.scoring.tail import Tail, position_wise

__all__ = ["Passes"]


class Passes:
    """Runs a model over one batch, each pass drawing what the clean one drew.

    Args:
        batch: the batch.
        drawn: what the clean pass drew, see `Generators.drawn`.
        clean: the logits of the unfrozen model at the batch's positions `[row, position, word]`.
    """

    def __init__(self, model: nn.Module, sites: Sites, batch: Batch, generators: Generators) -> None:
        self._model = model
        self._sites = sites
        self.batch = batch
        self._generators = generators
        self._start = generators.states()
        self._cached = CachedLayers([], generators)
        self._layers: CachedLayers | None = None
        self._tail: Tail | None = None
        self._stacked: Stacked | None = None
        self.drawn = 0.0
        self.clean = torch.empty(0)

    @contextmanager
    def running(self, freezes: Mapping[int, int]) -> Iterator[None]:
        """Runs the clean pass and finds out which parts of later ones can be left out; then `frozen` can be called.

        Afterwards the generators are as the clean pass left them.

        Args:
            freezes: how many the sweep has of each layer; empty if no pass is to follow.
        """
        whole = _compiled(self._model) or foreign_code(self._model)
        layers = [] if whole else layers_of(self._model, self._sites)
        cached, tail = CachedLayers(layers, self._generators), self._tail_of(layers)
        self._cached = cached
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(cached.attached())
            if tail:
                stack.enter_context(tail.attached())
            before = written(self._model)
            with cached.recording():
                self.clean = self._at_positions(self._logits())
            keeps_nothing = written(self._model) == before
            self.drawn = self._generators.drawn(self._start)
            stack.callback(self._generators.put, self._generators.states())
            if layers and freezes:
                self._shorten(cached, tail)
                cached.shares_work = self._layers is not None
                if keeps_nothing:
                    self._stack(freezes)
            yield

    def whole(self, freezes: Sequence[LayerFreeze] = ()) -> Tensor:
        """The logits at the positions `[row, position, word]` of a whole pass under `freezes`, of any layers."""
        with install([(self._sites, freezes)]):
            return self._at_positions(self._logits())

    def stacks(self, freezes: int) -> list[range]:
        """Of so many freezes of a layer the places of those that run together: some of them cost as much as all."""
        return stacks(freezes, self._stacked.most if self._stacked else 1)

    def frozen(self, layer: int, freezes: Sequence[LayerFreeze], wanted: Collection[int]) -> Generator[Tensor]:
        """The logits at the positions `[row, position, word]` under freezes of one layer, in turn.

        Args:
            freezes: all that the sweep has of this layer: they decide which are run and unembedded together.
            wanted: the indices of those that are run; the bits of their logits do not depend on which these are.
        """
        with ExitStack() as stack:
            if self._layers:
                stack.enter_context(self._layers.starting_at(layer))
                projections = self._sites.by_layer[layer].layout.shared.modules.values()
                stack.enter_context(remembering(list(projections), self._generators))
            unders = [
                partial(install, [(self._sites, [freeze])]) if index in wanted else None
                for index, freeze in enumerate(freezes)
            ]
            several = [[unders[place] for place in places] for places in self.stacks(len(freezes))]
            at_once = max(1, self._tail.at_once // max(map(len, several))) if self._tail else 1
            for start in range(0, len(several), at_once):
                together = several[start : start + at_once]
                if any(map(any, together)):
                    yield from self._together(together, layer)

    def _together(self, several: Sequence[Sequence[Under | None]], layer: int = 0) -> Iterator[Tensor]:
        """The logits of a pass under each of several freezes, say, unembedded together where that pays.

        Args:
            several: those that are run together, `None` one that is not run; it has no logits.
            layer: the one that is frozen, where several are run together.
        """
        unders = [under for together in several for under in together]
        if self._tail is None or self._tail.at_once == 1:
            yield from (self._alone(under) for under in unders if under)
            return
        stacked = self._stacked if layer < len(self._layers or ()) - 1 else None
        for together in several:
            if stacked and len(together) > 1 and any(together):
                stacked.keep(layer, together)
                continue
            for under in together:
                if under is None:
                    self._tail.leave_out()
                    continue
                with under(), self._tail.doing("keep"):
                    self._logits()
        yield from (logits for logits, under in zip(self._unembedded(len(unders)), unders, strict=True) if under)

    def _alone(self, under: Under) -> Tensor:
        with under():
            if self._tail is None:
                return self._at_positions(self._logits())
            with self._tail.doing("run"):
                return self._logits()

    def _unembedded(self, count: int) -> Sequence[Tensor]:
        """The logits at the positions of so many passes whose states the tail has kept."""
        assert self._layers
        assert self._tail
        with self._layers.starting_at(len(self._layers)), self._tail.doing("give"):
            return self._logits().chunk(count)

    def _logits(self, batch: Batch | None = None) -> Tensor:
        self._generators.put(self._start)
        with self._cached.own_pass():
            return logits_of(run(self._model, copied((batch or self.batch).arguments)))

    def _at_positions(self, logits: Tensor) -> Tensor:
        """Of logits of all columns those at the positions."""
        expected = (self.batch.rows, self.batch.columns)
        if logits.shape[:2] != expected or logits.dim() != 3:
            raise InterventionError(
                f"{type(self._model).__name__} gave logits {list(logits.shape)} for {list(expected)} [batch, token]: "
                "they must be of every token (no logits_to_keep=)"
            )
        return self.batch.at_positions(logits)

    def _tail_of(self, layers: Sequence[nn.Module]) -> Tail | None:
        getter = getattr(self._model, "get_output_embeddings", None)
        unembedding = getter() if getter else None
        if not layers or not isinstance(unembedding, nn.Module):
            return None
        held = [
            module
            for site in self._sites.by_layer.values()
            for module in (site.attention, site.layout.output, *site.layout.shared.modules.values())
        ]
        return Tail(unembedding, position_wise(layers[-1], held), self.batch)

    def _shorten(self, cached: CachedLayers, tail: Tail | None) -> None:
        """Leaves out of later passes what the clean one shows to make no difference."""
        tail = tail if tail and tail.runs == 1 else None
        with tail.doing("skip") if tail else nullcontext():
            if not cached.hand_on_all(self._logits):
                return
        self._layers = cached
        if tail:
            tail.restrict()
            if self._agrees(cached, tail):
                tail.trust()
                return
            tail.unrestrict()
            if self._agrees(cached, tail):
                return
        if not self._agrees(cached, None):
            self._layers = None

    def _agrees(self, cached: CachedLayers, tail: Tail | None) -> bool:
        """Goes on with `tail` if the logits that it gives are the clean ones, but for the products' other shapes.

        A pass in which every layer reads other states comes before the one that is compared, and is unembedded with it:
        what follows the layers may read something behind their backs, or of other rows.
        """
        self._tail = tail
        ways: list[list[Under | None]] = [[cached.upsetting], [partial(cached.starting_at, len(cached) - 1)]]
        found = self._tried(lambda: list(self._together(ways))[1])
        if found is not None:
            self.clean = found  # made as the frozen ones are made
            return True
        self._tail = None
        return False

    def _stack(self, freezes: Mapping[int, int]) -> None:
        """Has freezes of one layer run together, where that pays and the clean pass shows that rows are apart."""
        config = getattr(self._model, "config", None)
        decodes = bool(getattr(config, "is_encoder_decoder", False))  # its encoder would be run twice as often
        if not self._layers or not self._tail or self.drawn or decodes or not self.batch.by_token:
            return
        stacked, first = Stacked(self._layers, self._tail, self.batch, self._logits), min(freezes)
        if not stacked.pays(freezes):
            return

        def beside_others() -> Tensor:
            stacked.keep_beside_others(first)
            return self._unembedded(3)[1]

        if self._tried(beside_others) is not None:
            self._stacked = stacked

    def _tried(self, way: Callable[[], Tensor]) -> Tensor | None:
        """What `way` gives, if that are the clean logits but for the products' other shapes."""
        try:
            found = way()
        except torch.OutOfMemoryError:
            raise
        except FAULTS:
            found = None
        bound = _rounding(self.clean.dtype, self._tail.width if self._tail else 0)
        if found is not None and close(found, self.clean, bound):
            return found
        if self._tail:
            self._tail.forget()
        return None


def _rounding(dtype: torch.dtype, terms: int) -> float:
    """What two products of other shapes may differ by, as a share of their largest number.

    Some roundings of a number, and those of its sum: for terms of either sign they are as large as the typical sum
    times the root of their number (N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis",
    2019), and are in float32 at least.
    """
    eps = torch.finfo(dtype).eps
    return 8 * eps + math.sqrt(terms) * min(eps, torch.finfo(torch.float32).eps)


def _compiled(model: nn.Module) -> bool:
    """Whether some of the model is compiled: it would be compiled anew for each layer that is left out."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
