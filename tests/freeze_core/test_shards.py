"""What a freeze does in one process where tensor parallelism spreads a layer's features over two."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor import Shard as Placement
from torch.nn import functional as F

from freeze_core import (
    AttentionCircuitFreezer,
    ExperimentalInterventions,
    FreezeNotInForceError,
    InterventionConfig,
    UnsupportedModelError,
)
from freeze_core.attention.shards import Shard, shard_of
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(14).view(2, 7) * 5 % 97
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Mesh:
    """As much of torch's DeviceMesh as tells where a process is along each axis."""

    def __init__(self, *places):
        self.places = places

    def size(self, axis):
        return self.places[axis][1]

    def get_local_rank(self, axis):
        return self.places[axis][0]


class Stretch(nn.Module):
    """A linear layer as one of two processes has it: its own outputs (`dim` 0), or its own inputs (`dim` 1)."""

    def __init__(self, linear, dim, rank):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.chunk(2, dim)[rank])
        self.weight.placements, self.weight.device_mesh = (Placement(dim),), Mesh((rank, 2))
        self.bias = linear.bias
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.chunk(2)[rank] if dim == 0 else linear.bias / 2)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def process(rank):
    """The model as the process of this rank has it: the attention it gives is to be added to the other's."""
    model = tiny_model("llama_gqa")
    for layer in model.model.layers:
        for name in PROJECTIONS:
            spread = Stretch(getattr(layer.self_attn, name), int(name == "o_proj"), rank)
            setattr(layer.self_attn, name, spread)
    return model


def attention_of(model, frozen):
    """What the first layer's attention adds to the residual stream; of the later ones a process alone has no inputs."""
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with frozen(model):
        model(IDS)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("heads", [[0], [3], [1, 2]], ids=["of the first", "of the second", "of both"])
@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("circuit", ["qk", "ov", "z"])
def test_the_processes_together_give_what_one_would(heads, scope, circuit):
    def frozen(model):
        if circuit == "z":
            return ExperimentalInterventions().freeze_attention_heads(model, {0: heads}, freeze_type="mean")
        config = InterventionConfig([0], heads, circuit, "noise", kv_scope=scope, noise_std=1.0)
        return FREEZER.freeze_circuits(model, config)

    together = sum(attention_of(process(rank), frozen) for rank in (0, 1))
    # float32 products of 32 features, added in two parts
    torch.testing.assert_close(together, attention_of(tiny_model("llama_gqa"), frozen), rtol=1e-5, atol=1e-6)


def test_a_projection_that_is_spread_after_the_freeze_is_refused():
    model = tiny_model("llama_gqa")
    attention = model.model.layers[0].self_attn
    with FREEZER.freeze_circuits(model, InterventionConfig([0])):
        attention.q_proj.weight.data = attention.q_proj.weight.data[:16]
        attention.q_proj.bias = None
        with pytest.raises(FreezeNotInForceError, match="gave 16 features where 32 were expected"):
            model(IDS)


def weight(placements, mesh, shape=(4, 4)):
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape))
    module.weight.placements, module.weight.device_mesh = placements, mesh
    return module


def test_a_stretch_is_where_its_process_is():
    stretches = [shard_of(weight((Placement(0),), Mesh((rank, 4))), 0, 10) for rank in range(4)]
    assert stretches == [Shard(0, 3, 10), Shard(3, 6, 10), Shard(6, 9, 10), Shard(9, 10, 10)]
    beyond = [shard_of(weight((Placement(0),), Mesh((rank, 4))), 0, 2) for rank in range(4)]
    assert beyond == [Shard(0, 1, 2), Shard(1, 2, 2), Shard(2, 2, 2), Shard(2, 2, 2)]
    second = weight((Replicate(), Placement(1)), Mesh((1, 3), (1, 2)))
    assert shard_of(second, 1, 8) == Shard(4, 8, 8)


def test_what_is_whole_here_is_no_stretch():
    assert shard_of(nn.Linear(2, 2), 0, 2) is None
    assert shard_of(weight((Replicate(),), Mesh((0, 2))), 0, 4) is None
    assert shard_of(weight((Placement(1),), Mesh((0, 2))), 0, 4) is None
    assert shard_of(weight(None, Mesh((0, 2))), 0, 4) is None
    assert shard_of(weight((Placement(0),), None), 0, 4) is None


@pytest.mark.parametrize(
    ("placements", "mesh"),
    [((Placement(0), Placement(1)), Mesh((0, 2), (0, 2))), ((Partial(),), Mesh((0, 2)))],
    ids=["along both dimensions", "as terms of a sum"],
)
def test_what_is_no_one_stretch_is_refused(placements, mesh):
    with pytest.raises(UnsupportedModelError, match="spread over processes as"):
        shard_of(weight(placements, mesh), 0, 4)


def test_the_own_stretch_of_repeated_heads_is_that_of_each_of_them():
    shard, own = Shard(1, 3, 4), torch.tensor([[5.0, 6.0]])
    assert shard.whole(own).tolist() == [[0, 5, 6, 0]]
    assert shard.own(torch.arange(4)).tolist() == [1, 2]
    assert shard.own(torch.arange(8)).tolist() == [2, 3, 4, 5]
