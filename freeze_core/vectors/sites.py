"""Where the residual stream is: what a whole decoder layer gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from freeze_core.arguments import is_index, refuse
from freeze_core.attention.layout import Sites
from freeze_core.attention.sites import find_sites
from freeze_core.errors import InterventionError, UnsupportedModelError
from freeze_core.scoring.layer_cache import layers_of

__all__ = ["ResidualSite", "find_residual", "stream_of", "with_stream"]


@dataclass(frozen=True, eq=False)
class ResidualSite:
    """The residual stream after one decoder layer.

    Args:
        layer: which, counted from 0.
        module: the layer.
        path: of the layer within the stack.
        sites: the stack, and the attention layers by which a model is told from another.
        hidden: features of the stream, `None` where the config does not tell.
    """

    layer: int
    module: nn.Module
    path: str
    sites: Sites
    hidden: int | None

    @property
    def name(self) -> str:
        """What messages call the layer."""
        return f"{self.path} of {type(self.sites.stack).__name__}"


def find_residual(model: nn.Module, layer: object) -> ResidualSite:
    """The stream after `layer`; negative ones count from the end.

    Raises:
        UnsupportedModelError: a model that cannot be frozen, or whose layers are not one list of different modules.
        InterventionError: no such layer.
    """
    sites = find_sites(model)
    layers = layers_of(model, sites)
    paths = {module: path for path, module in sites.stack.named_modules()}
    attentions = {site.attention for site in sites.by_layer.values()}
    if not layers or any(one not in paths or one in attentions for one in layers):  # some list attentions apart
        raise UnsupportedModelError(
            f"{type(model).__name__} has no one list of whole layers, each a module of its own, so that there is no "
            "stream after one of them: freeze heads instead"
        )
    size = len(layers)
    if not is_index(layer) or not -size <= int(layer) < size:
        refuse("layer", layer, f"an int in {-size} to {size - 1}, of {size} layers")
    number = int(layer) % size
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None)
    module = layers[number]
    return ResidualSite(number, module, paths[module], sites, hidden if isinstance(hidden, int) else None)


def stream_of(output: Any, name: str) -> Tensor:
    """The residual stream `[batch, token, hidden]` in what a layer gives: that itself, or the first of several.

    Raises:
        InterventionError: it gives something else.
    """
    first = output[0] if type(output) in (tuple, list) and output else output
    if not isinstance(first, Tensor) or first.dim() != 3 or not first.is_floating_point():
        shape = list(first.shape) if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise InterventionError(
            f"{name} gives {shape} where [batch, token, hidden] was expected: it has no one residual stream"
        )
    return first


def with_stream(output: Any, stream: Tensor) -> Any:
    """What a layer gives, with another residual stream in it."""
    return type(output)([stream, *output[1:]]) if type(output) in (tuple, list) else stream
