"""The passes over one batch: the clean one, and one for each freeze."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.generators import Generators
from freeze_core.scoring.batches import Batch
from freeze_core.scoring.known_code import foreign_code
from freeze_core.scoring.layer_cache import LayerCache, RecordLayer, layers_of
from freeze_core.scoring.patched_calls import PatchedModule, attach
from freeze_core.scoring.projection_cache import ReuseOutput
from freeze_core.scoring.shared_passes import PatchedModel, SharedPasses
from freeze_core.scoring.shortcuts import buffer_versions, find_shared_passes, share_rows
from freeze_core.scoring.unembedding import ObserveUnembedding

__all__ = ["BatchPasses"]


class BatchPasses:
    """Runs a model over one batch, each pass drawing what the clean one drew.

    Args:
        batch: the batch.
        drawn: what the clean pass drew, see `Generators.drawn`.
        clean: the logits of the unfrozen model at the batch's positions `[row, position, word]`.
    """

    def __init__(self, model: nn.Module, sites: Sites, batch: Batch, generators: Generators) -> None:
        self._model = model
        self._sites = sites
        self._generators = generators
        self._shared = SharedPasses(PatchedModel(model, sites, batch, generators))
        self.batch = batch
        self.drawn = 0.0
        self.clean = torch.empty(0)

    @contextmanager
    def running(self, freezes: Mapping[int, int]) -> Iterator[None]:
        """Runs the clean pass and finds out which work later ones can share; then `frozen` can be called.

        Afterwards the generators are as the clean pass left them.

        Args:
            freezes: how many the sweep has of each layer; empty if no pass is to follow.
        """
        layers = [] if _is_compiled(self._model) or foreign_code(self._model) else layers_of(self._model, self._sites)
        model = PatchedModel(self._model, self._sites, self.batch, self._generators, layers)
        records, unembedding = [RecordLayer(self._generators) for _ in layers], ObserveUnembedding()
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(model.attached())
            before = buffer_versions(self._model)
            self.clean = model.at_positions(model.run(records, unembedding))
            writes = buffer_versions(self._model) != before
            self.drawn = self._generators.drawn(model.start)
            stack.callback(self._generators.put, self._generators.states())
            self._shared = SharedPasses(model)
            if layers and freezes:
                self._shared, self.clean = find_shared_passes(model, LayerCache(records), unembedding, self.clean)
                if self._shared.cache:
                    model.refuse_other_runs()
                if not writes and not self.drawn:
                    self._shared = share_rows(self._shared, self.clean, freezes)
            yield

    def whole(self, freezes: Sequence[LayerFreeze] = ()) -> Tensor:
        """The logits at the positions `[row, position, word]` of a whole pass under `freezes`, of any layers."""
        model = self._shared.model
        return model.at_positions(model.run(freezes=freezes))

    def groups(self, freezes: int) -> list[range]:
        """Of so many freezes of a layer the indices of those that run together: some of them cost as much as all."""
        return self._shared.groups(freezes)

    def frozen(self, layer: int, freezes: Sequence[LayerFreeze], wanted: Collection[int]) -> Generator[Tensor]:
        """The logits at the positions `[row, position, word]` under freezes of one layer, in turn.

        Args:
            freezes: all that the sweep has of this layer: they decide which are run and unembedded together.
            wanted: the indices of those that are run; the bits of their logits do not depend on which these are.
        """
        chosen = [freeze if index in wanted else None for index, freeze in enumerate(freezes)]
        shared = self._sites.by_layer[layer].layout.shared.modules.values() if self._shared.cache else ()
        with attach(PatchedModule(projection, ReuseOutput(self._generators)) for projection in shared):
            yield from self._shared.frozen(layer, chosen)


def _is_compiled(model: nn.Module) -> bool:
    """Whether some of the model is compiled: it would be compiled anew for each layer that is left out."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
