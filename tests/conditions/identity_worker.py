"""One of the processes of `test_identity.py`, which starts two by torchrun with the folder of a checkpoint.

Every process fails where the identity of a sharded model is not that of the whole one.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from freeze_core.attention.sites import find_sites
from freeze_core.identity import checksums, model_identity


def whole(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def fsdp2(folder: str) -> Any:
    model = whole(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_per_attention(folder: str) -> Any:
    model = whole(folder)
    for layer in model.model.layers:
        fully_shard(layer.self_attn)
    return fully_shard(model)


def tp_plan(folder: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # tp_plan has a newer spelling that older versions lack
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


def parallelized(folder: str) -> Any:
    model = whole(folder)
    plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, init_device_mesh("cpu", (2,)), plan)
    return model


def fsdp1(folder: str) -> Any:
    return FullyShardedDataParallel(whole(folder), use_orig_params=True, device_id=torch.device("cpu"))


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    expected = model_identity(find_sites(whole(folder)))
    for make in (fsdp2, fsdp2_per_attention, tp_plan, parallelized, fsdp1):
        model = make(folder)
        found = model_identity(find_sites(model))
        if found != expected:
            raise AssertionError(f"{make.__name__}: {found}, expected {expected}")
        weight = next(one for name, one in model.named_parameters() if name.endswith("layers.1.mlp.down_proj.weight"))
        with torch.no_grad():
            if dist.get_rank() == 1:  # its shard alone
                (weight.to_local() if hasattr(weight, "to_local") else weight).view(-1)[-1:].mul_(-1)
        if make is not fsdp1 and hasattr(weight, "to_local") and model_identity(find_sites(model)) == expected:
            raise AssertionError(f"{make.__name__}: one element of a shard is another, and the identity is not")
    uneven()
    dist.destroy_process_group()


def uneven() -> None:
    """Shards of any dimension, of which the last is shorter or empty, sum to the checksum of the whole."""
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    for shape in ((5, 3), (1, 7), (4, 3, 5), (9,)):
        tensor = torch.randn(shape, generator=generator)
        expected = checksums(holding(tensor))
        for dim in range(len(shape)):
            found = checksums(holding(distribute_tensor(tensor, mesh, [Shard(dim)])))
            if found != expected:
                raise AssertionError(f"{shape} along {dim}: {found}, expected {expected}")


def holding(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
