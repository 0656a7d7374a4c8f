"""pyvene: an intervention of our own on the heads that its components of queries, keys and values give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import pyvene
from torch import Tensor, nn

from freeze_core import InterventionConfig
from pytest_circuitfreeze.adapters.arithmetic import Arithmetic, beyond_outputs, named
from pytest_circuitfreeze.adapters.places import Layer, layers

COMPONENTS = {"q": "head_query_output", "k": "head_key_output", "v": "head_value_output"}
TOKENS = ("input_ids", "inputs_embeds")
"""What a model may be given that has a row for each of its own."""


class Frozen(pyvene.ConstantSourceIntervention):  # type: ignore[misc]  # pyvene has no types
    """Gives what `edit` makes of all heads, `[batch, token, head, feature]`."""

    def __init__(self, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__(keep_last_dim=True)
        self.edit = edit

    def forward(self, base: Tensor, source: None = None, subspaces: None = None) -> Tensor:
        """`base` is pyvene's `[batch, head, token, feature]`."""
        return self.edit(base.transpose(1, 2)).transpose(1, 2)


class PyveneEngine(Arithmetic):
    """Freezes for the length of each call of what it yields."""

    name = "pyvene"
    not_offered: Mapping[str, str] = MappingProxyType(
        {
            "nesting_is_a_list": "an intervenable model runs its own interventions alone",
            "foreign_caches_are_recognised": "a cache is the model's own, and nothing marks under what it was filled",
        }
    )

    def supports(self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> str | None:
        """Declines models that pyvene has no components of, and what takes more than a projection's output."""
        known = pyvene.type_to_module_mapping.get(type(model), {})
        if not set(COMPONENTS.values()) <= known.keys():
            return f"pyvene maps no {', '.join(COMPONENTS.values())} of {type(model).__name__}"
        reason = beyond_outputs(model, config, "components have")
        if reason is not None:
            return reason
        for layer in layers(model):
            if any(known[COMPONENTS[role]][0].rpartition(".")[2] != name for role, (name, _) in layer.places.items()):
                return f"pyvene looks for the queries, keys and values of {type(model).__name__} elsewhere"
        return None

    @contextmanager
    def freeze(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Yields a callable that runs `model` with interventions.

        Raises:
            InterventionError: `supports` has a reason, or statistics are of another model.
        """
        configs = self.asked(model, config)
        frozen = [layer for layer in layers(model) if any(self.in_layer(one, layer) for one in configs)]
        places = [(layer, role) for layer in frozen for role in COMPONENTS]
        intervenable = self.intervenable(model, configs, places)

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = named(model, args, kwargs)
            self.remember(arguments)
            rows = next(len(arguments[name]) for name in TOKENS if arguments.get(name) is not None)
            heads = [[list(range(len(layer.places[role][1])))] * rows for layer, role in places]
            return intervenable(arguments, unit_locations={"base": heads})[1] if places else model(**arguments)

        yield run

    def intervenable(
        self, model: nn.Module, configs: list[InterventionConfig], places: list[tuple[Layer, str]]
    ) -> pyvene.IntervenableModel:
        """One intervention a role and layer; gradients and training flags as they were, which pyvene turns off."""
        interventions = [
            {
                "layer": layer.number,
                "component": COMPONENTS[role],
                "unit": "h",
                "intervention": Frozen(partial(self.of_role, layer, role, configs)),
            }
            for layer, role in places
        ]
        training, wanted = model.training, {each: each.requires_grad for each in model.parameters()}
        made = pyvene.IntervenableModel(interventions, model=model)
        model.train(training)
        for parameter, gradient in wanted.items():
            parameter.requires_grad = gradient
        return made

    def of_role(self, layer: Layer, role: str, configs: list[InterventionConfig], x: Tensor) -> Tensor:
        """All freezes of one role of a layer, `[batch, token, head, feature]`."""
        own = [one for one in configs if self.in_layer(one, layer)]
        return self.frozen(layer, role, x, own, layer.heads // x.shape[2])
