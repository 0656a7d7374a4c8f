"""Which features of an activation this process has, where tensor parallelism spreads a projection over several.

transformers' `tp_plan` keeps a projection's weight as a `DTensor`, each process with a stretch of its features, and
either gathers what they give or hands on the process's own stretch. Torch's `parallelize_module` converts in hooks on
the projections: their forwards take and give `DTensor`s, which say by themselves how they are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freeze_core.errors import UnsupportedModelError

__all__ = ["Shard", "gathered", "gathered_from", "shard_of", "sharded_like", "unsharded"]


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


def gathered(activation: Tensor, name: str) -> Tensor:
    """An activation `[..., feature]` with the features of all processes, as a plain tensor; gradients flow through.

    Every process of the `DTensor`'s mesh must call this. A plain tensor is returned as it is.

    Args:
        name: of the activation, for the message.

    Raises:
        UnsupportedModelError: the `DTensor` is sharded along another dimension than its features, or holds terms of a
            sum.
    """
    placements: Any = None if type(activation) is Tensor else getattr(activation, "placements", None)
    if placements is None:
        return activation
    last = activation.dim() - 1
    if not all(one.is_replicate() or one.is_shard(last) for one in placements):
        raise UnsupportedModelError(
            f"{name} is a DTensor {list(activation.shape)} with placements {placements}: only Replicate and Shard of "
            f"the last dimension are supported, since a process must have every row and token of its heads; gather "
            "the activation before the projection (in PrepareModuleInput, or input_layouts and output_layouts of "
            "ColwiseParallel and RowwiseParallel)"
        )
    sharded: Any = activation
    whole: Tensor = sharded.full_tensor()
    return whole


def gathered_from(module: nn.Module, dim: int, activation: Tensor, width: int, name: str) -> Tensor:
    """An activation `[..., width]` of which this process may have its own stretch, as `gathered` gives it.

    Every process of the mesh must call this. What is not the stretch of a sharded `module` is returned as it is.

    Args:
        module: the projection that gives (`dim` 0) or takes (`dim` 1) the activation.
        dim: the dimension of the module's weight that the features are along.
    """
    activation = gathered(activation, name)
    if activation.shape[-1] == width:
        return activation
    shard = shard_of(module, dim, width)
    if shard is None or activation.shape[-1] != shard.stop - shard.start:
        return activation
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Sharded

    weight: Any = module.weight
    features = Sharded(activation.dim() - 1)
    placements = [Replicate() if one.is_replicate() else features for one in weight.placements]
    shape = torch.Size([*activation.shape[:-1], width])
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(
        activation.contiguous(), weight.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    whole: Tensor = sharded.full_tensor()
    return whole


def sharded_like(whole: Tensor, activation: Tensor) -> Tensor:
    """`whole` `[..., feature]` with the placements of `activation`, where that is a `DTensor`.

    The number of features may be another, as of repeated heads.
    """
    if type(activation) is Tensor or not hasattr(activation, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    like: Any = activation
    mesh = like.device_mesh
    replicated: Any = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded: Tensor = replicated.redistribute(placements=like.placements)
    return sharded


@contextmanager
def unsharded(model: nn.Module, inner: Iterable[nn.Module]) -> Iterator[None]:
    """Lets modules in a model be called by themselves where FSDP2 (`fully_shard`) shards their parameters.

    FSDP2 gathers parameters in the forward of the module that `fully_shard` was applied to, and a projection or a norm
    inside of it would be called with its shards.

    Args:
        inner: the modules that are called; the parameters of the others stay sharded.
    """
    called = set(inner)
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "unshard") and hasattr(module, "reshard") and called & set(module.modules()):
                group: Any = module
                stack.callback(group.reshard)
                group.unshard()
        yield
