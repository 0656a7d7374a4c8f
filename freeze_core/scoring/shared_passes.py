"""Passes over one batch that share work: `PatchedModel` runs one pass, `SharedPasses` those of a sweep.

What may be shared is found out in `freeze_core.scoring.shortcuts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.attention.layout import Sites
from freeze_core.errors import InterventionError
from freeze_core.freezing.install import install
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, run
from freeze_core.scoring.batched_freezes import TOKENS, group_freezes
from freeze_core.scoring.batches import Batch, copied
from freeze_core.scoring.layer_cache import LayerCache, RecordLayer, refuse_run
from freeze_core.scoring.patched_calls import Action, PatchedModule, assign_actions, attach, run_module
from freeze_core.scoring.unembedding import (
    CollectStates,
    ObserveUnembedding,
    RunAtPositions,
    UnembedAtPositions,
    UnembedStates,
    find_parts,
)

__all__ = ["PatchedModel", "SharedPasses"]


class PatchedModel:
    """Runs passes over one batch, each of which draws what the first one drew.

    Args:
        layers: the modules that can be patched; empty if every pass is to run the whole model.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, batch: Batch, generators: Generators, layers: Sequence[nn.Module] = ()
    ) -> None:
        self.model = model
        self.batch = batch
        self.generators = generators
        self.start = generators.states()
        self.layers = [PatchedModule(layer) for layer in layers]
        self._sites = sites
        getter = getattr(model, "get_output_embeddings", None)
        unembedding = getter() if layers and getter else None
        self.unembedding = [PatchedModule(unembedding)] if isinstance(unembedding, nn.Module) else []
        parts = find_parts(layers[-1], _attention_modules(sites)) if self.unembedding and not batch.everywhere else []
        self._parts = [PatchedModule(part) for part in parts]

    def attached(self) -> AbstractContextManager[None]:
        """Patches the model within the context."""
        return attach([*self.layers, *self.unembedding, *self._parts])

    def run(
        self,
        layers: Sequence[Action] = (),
        unembedding: Action = run_module,
        fill: float | None = None,
        freezes: Sequence[LayerFreeze] = (),
        batch: Batch | None = None,
    ) -> Tensor:
        """The logits of one pass. No other code says what a patched module does in a pass.

        Args:
            layers: the action of each layer; empty runs all.
            unembedding: its action.
            fill: what the parts of the last layer give at other than the wanted positions; `None` runs them at all.
            freezes: installed for the pass.
            batch: copies of the batch, where it is not the batch itself.
        """
        batch = batch or self.batch
        actions: list[tuple[PatchedModule, Action]] = [
            *zip(self.layers, layers or repeat(run_module), strict=False),
            *((patch, unembedding) for patch in self.unembedding),
        ]
        if fill is not None:
            actions += [(part, RunAtPositions(batch, fill)) for part in self._parts]
        with install([(self._sites, freezes)]) if freezes else nullcontext(), assign_actions(actions):
            self.generators.put(self.start)
            return logits_of(run(self.model, copied(batch.arguments)))

    def at_positions(self, logits: Tensor) -> Tensor:
        """Of logits of all columns those at the positions `[row, position, word]`."""
        expected = (self.batch.rows, self.batch.columns)
        if logits.shape[:2] != expected or logits.dim() != 3:
            raise InterventionError(
                f"{type(self.model).__name__} gave logits {list(logits.shape)} for {list(expected)} [batch, token]: "
                "they must be of every token (no logits_to_keep=)"
            )
        return self.batch.at_positions(logits)

    def refuse_other_runs(self) -> None:
        """From now on an error is raised where anything but `run` runs the layers."""
        for layer in self.layers:
            layer.action = refuse_run


def _attention_modules(sites: Sites) -> list[nn.Module]:
    """The modules in which something may be frozen."""
    return [
        module
        for site in sites.by_layer.values()
        for module in (site.attention, site.layout.output, *site.layout.shared.modules.values())
    ]


@dataclass(frozen=True, eq=False)
class SharedPasses:
    """The passes over one batch, which share the work that the fields say; with none of them each is a whole one.

    Args:
        model: runs them.
        cache: passes start at their layer, with what the layers before it gave in the clean pass.
        unembedding: the logits are made at the positions only, of several passes at once.
        fill: the parts of the last layer run at the positions only, and give this at the others.
        rows_are_independent: freezes of one layer go through the later layers as rows of one pass.
    """

    model: PatchedModel
    cache: LayerCache | None = None
    unembedding: ObserveUnembedding | None = None
    fill: float | None = None
    rows_are_independent: bool = False

    @property
    def at_once(self) -> int:
        """How many passes are unembedded together."""
        return self.unembedding.passes_at_once(self.model.batch) if self.unembedding else 1

    @property
    def most_rows(self) -> int:
        """How many copies of the batch a pass may have. It depends on shapes alone: so do the bits of the logits."""
        return min(TOKENS // (self.model.batch.rows * self.model.batch.columns), self.at_once)

    def groups(self, freezes: int) -> list[range]:
        """The indices of the freezes of one layer that run together: some of a group cost as much as all."""
        return group_freezes(freezes, self.most_rows if self.rows_are_independent else 1)

    def frozen(self, layer: int, freezes: Sequence[LayerFreeze | None]) -> Iterator[Tensor]:
        """The logits at the positions `[row, position, word]` under each freeze of `layer` that is not `None`.

        Args:
            freezes: all of the layer, `None` in the place of one that is not to be run. The groups are those of all,
                so that logits are the same bits whichever are run.
        """
        layers = self.cache.starting_at(layer) if self.cache else []
        if self.at_once == 1:
            yield from (self.logits(layers, [freeze]) for freeze in freezes if freeze)
            return
        groups = [[freezes[index] for index in indices] for indices in self.groups(len(freezes))]
        size = max(1, self.at_once // max(map(len, groups)))
        for start in range(0, len(groups), size):
            some = groups[start : start + size]
            if not any(map(any, some)):
                continue
            states = [one for group in some for one in self._states_of_group(layer, layers, group)]
            flat = [freeze for group in some for freeze in group]
            yield from (one for one, freeze in zip(self.unembed(states), flat, strict=True) if freeze)

    def logits(self, layers: Sequence[Action], freezes: Sequence[LayerFreeze] = ()) -> Tensor:
        """The logits at the positions of one pass that is unembedded by itself."""
        if self.unembedding is None:
            return self.model.at_positions(self.model.run(layers, freezes=freezes))
        return self.model.run(layers, UnembedAtPositions(self.model.batch), self.fill, freezes)

    def last_states(
        self, layers: Sequence[Action], freezes: Sequence[LayerFreeze] = (), batch: Batch | None = None
    ) -> Tensor:
        """What the unembedding is given in one pass, at the positions `[row, position, feature]`."""
        assert self.unembedding
        collected = CollectStates(self.unembedding, batch or self.model.batch)
        self.model.run(layers, collected, self.fill, freezes, batch)
        return collected.states

    def unembed(self, states: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """The logits at the positions of several passes, made of their last states in a pass that runs no layer."""
        assert self.cache
        logits: Tensor = self.model.run(self.cache.starting_at(len(self.model.layers)), UnembedStates(states))
        return logits.chunk(len(states))

    def last_states_of_rows(self, layer: int, outputs: Sequence[Any]) -> Sequence[Tensor]:
        """The last states of passes that continue from `outputs` of `layer`, as rows of one pass."""
        assert self.cache
        copies = self.model.batch.copies(len(outputs))
        states = self.last_states(self.cache.continuing_from(layer, outputs), batch=copies)
        rows: tuple[Tensor, ...] = torch.split(states, self.model.batch.rows)
        return rows

    def _states_of_group(
        self, layer: int, layers: Sequence[Action], group: Sequence[LayerFreeze | None]
    ) -> Sequence[Tensor | None]:
        """The last states under each freeze of a group.

        Where a group is run together, the clean pass takes the place of freezes that are not run: the products of the
        others are then of the same shape.
        """
        assert self.cache
        if len(group) == 1 or layer == len(self.model.layers) - 1 or not any(group):
            return [self.last_states(layers, [freeze]) if freeze else None for freeze in group]
        outputs = [self._output(layer, freeze) if freeze else self.cache.records[layer].output for freeze in group]
        return self.last_states_of_rows(layer, outputs)

    def _output(self, layer: int, freeze: LayerFreeze) -> Any:
        """What `layer` gives under a freeze, in a pass that runs no other layer."""
        assert self.cache
        recorded = RecordLayer(self.model.generators)
        self.last_states(self.cache.running_only(layer, recorded), [freeze])
        return recorded.output
