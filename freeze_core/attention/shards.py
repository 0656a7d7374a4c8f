"""Which features of an activation this process has, where tensor parallelism spreads a projection over several.

transformers' `tp_plan` keeps a projection's weight as a `DTensor`, each process with a stretch of its features, and
either gathers what they give or hands on the process's own stretch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from freeze_core.errors import UnsupportedModelError

__all__ = ["Shard", "shard_of"]


class Shard(NamedTuple):
    """Features `start` to `stop` of `width`."""

    start: int
    stop: int
    width: int

    def whole(self, own: Tensor) -> Tensor:
        """`own` `[..., stop - start]` put where it is in the whole activation `[..., width]`, zeros elsewhere."""
        return F.pad(own, (self.start, self.width - self.stop))

    def own(self, whole: Tensor) -> Tensor:
        """This process's stretch of `whole`, in which each head may have been repeated for those that share it."""
        repeated = whole.shape[-1] // self.width
        return whole[..., self.start * repeated : self.stop * repeated]


def shard_of(module: nn.Module, dim: int, width: int) -> Shard | None:
    """The stretch of `width` features along dimension `dim` of the weight that this process has; `None` is all.

    Raises:
        UnsupportedModelError: they are not one stretch.
    """
    weight: Any = getattr(module, "weight", None)
    placements, mesh = getattr(weight, "placements", None), getattr(weight, "device_mesh", None)
    if placements is None or mesh is None:
        return None
    spread = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if not any(_along(placements[axis], dim) for axis in spread):
        return None
    if len(spread) > 1 or type(placements[spread[0]]).__name__ != "Shard":
        raise UnsupportedModelError(
            f"a {type(module).__name__} is spread over processes as {placements}: which heads are this process's is "
            "known where its features are cut into one stretch a process, as by tp_plan's 'colwise' and 'rowwise'"
        )
    stretch = -(-width // mesh.size(spread[0]))
    start = min(stretch * mesh.get_local_rank(spread[0]), width)
    return Shard(start, min(start + stretch, width), width)


def _along(placement: Any, dim: int) -> bool:
    return bool(getattr(placement, "dim", dim) == dim)
