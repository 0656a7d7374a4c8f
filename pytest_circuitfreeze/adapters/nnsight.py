"""nnsight: each pass is a trace, in which the outputs of projections are replaced as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from nnsight import NNsight
from torch import nn

from freeze_core import InterventionConfig
from pytest_circuitfreeze.adapters.arithmetic import Arithmetic, beyond_outputs, named
from pytest_circuitfreeze.adapters.places import layers


class NNsightEngine(Arithmetic):
    """Freezes for the length of each call of what it yields; the model stays wrapped, as nnsight leaves it."""

    name = "nnsight"
    not_offered: Mapping[str, str] = MappingProxyType(
        {
            "nesting_is_a_list": "a trace is one pass with its own edits, and traces of one pass do not nest",
            "foreign_caches_are_recognised": "a cache is the model's own, and nothing marks under what it was filled",
        }
    )

    def supports(self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]) -> str | None:
        """Declines what takes more than a module's output in one run of it."""
        return beyond_outputs(model, config, "modules give")

    @contextmanager
    def freeze(
        self, model: nn.Module, config: InterventionConfig | Sequence[InterventionConfig]
    ) -> Iterator[Callable[..., Any]]:
        """Yields a callable that traces `model`.

        Raises:
            InterventionError: `supports` has a reason, or statistics are of another model.
        """
        configs = self.asked(model, config)
        paths = {module: path for path, module in model.named_modules()}
        traced = NNsight(model)

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = named(model, args, kwargs)
            self.remember(arguments)
            with traced.trace(**arguments):
                for layer in layers(model):
                    own = [one for one in configs if self.in_layer(one, layer)]
                    for role, (name, features) in layer.places.items() if own else ():
                        projection = traced.get(f"{paths[layer.module]}.{name}")
                        projection.output = self.edited(layer, role, features, projection.output, own)
                output = traced.output.save()
            return output  # noqa: RET504 - a trace cannot be returned from

        yield run
