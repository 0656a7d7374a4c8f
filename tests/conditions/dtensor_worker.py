"""One of the processes of `test_dtensor.py`, which starts two by torchrun with the folder of a checkpoint.

Process 0 prints one line of JSON a result: how far a sharded model is from the whole one, or what it refused.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from plain_freeze import FREEZE_TYPES, config_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from freeze_core import (
    AttentionCircuitFreezer,
    CircuitFreezeError,
    ExperimentalInterventions,
    InterventionConfig,
    copying_scores,
    head_circuits,
    run_circuit_ablation_study,
    score_heads,
)

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(16).view(2, 8) * 5 % 97
PROMPTS = torch.arange(32).view(8, 4) * 5 % 97
HEADS = ([0], [3], [1, 2])
"""Heads of the first process, of the second, and of both."""


def whole(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def fsdp2(folder: str, mesh: DeviceMesh) -> Any:
    model = whole(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tp_plan(folder: str, mesh: DeviceMesh) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # tp_plan has a newer spelling that older versions lack
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager").eval()


def parallelized(folder: str, mesh: DeviceMesh) -> Any:
    model = whole(folder)
    plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, plan)
    return model


def heads_gathered(folder: str, mesh: DeviceMesh) -> Any:
    """The projections are sharded, and between them each process has all heads."""
    model = whole(folder)
    plan = {f"{name}_proj": ColwiseParallel(output_layouts=Replicate()) for name in "qkv"}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, {**plan, "o_proj": RowwiseParallel(input_layouts=Replicate())})
    return model


def sequence_parallel(folder: str, mesh: DeviceMesh) -> Any:
    """Between the projections each process has its own tokens; the attention has all of them."""
    model = whole(folder)
    tokens = Shard(1)
    first = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(tokens,), use_local_output=True)
    plan = {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": tokens},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
            use_local_output=True,
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "mlp.gate_proj": ColwiseParallel(input_layouts=tokens),
        "mlp.up_proj": ColwiseParallel(input_layouts=tokens),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(model.model.layers[0], mesh, first)
    last = {
        "model.norm": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=tokens, output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, last)


def tokens_split(folder: str, mesh: DeviceMesh) -> Any:
    """The query projection gives each process its own tokens, and then gathers them."""
    model = whole(folder)
    for layer in model.model.layers:
        parallelize_module(layer.self_attn.q_proj, mesh, SequenceParallelLinear())
    return model


class SequenceParallelLinear(SequenceParallel):
    """A linear layer whose input and output are sharded along tokens, and gathered behind it."""

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, module: Any, outputs: Any, mesh: DeviceMesh) -> Tensor:
        gathered: Tensor = outputs.full_tensor()
        return gathered

    @staticmethod
    def _prepare_input_fn(sequence_sharding: Any, module: Any, inputs: Any, mesh: DeviceMesh) -> Any:
        replicated = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
        return (replicated.redistribute(placements=[Shard(1)]),)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS, use_cache=False).logits
    return output


Results = Iterator[tuple[str, Callable[[Any], Any]]]


def freezes(reference: Any) -> Results:
    for number, (freeze_type, scope) in enumerate(product(FREEZE_TYPES, ("group", "head"))):
        heads = HEADS[number % 3]
        fields = {"reference": FREEZER.record(reference, IDS.flip(0) * 3 % 97)} if freeze_type == "reference" else {}
        config = config_of(freeze_type, reference, kv_scope=scope, head_indices=heads, **fields)
        yield f"freeze {freeze_type} {scope} {heads}", lambda model, config=config: frozen(model, config)
    yield "freeze z", lambda model: frozen_z(model)


def frozen(model: Any, config: InterventionConfig) -> Tensor:
    with FREEZER.freeze_circuits(model, config):
        return logits(model)


def frozen_z(model: Any) -> Tensor:
    with ExperimentalInterventions().freeze_attention_heads(model, {0: [0], 2: [1, 2]}, freeze_type="mean"):
        return logits(model)


def gradients(reference: Any) -> Results:
    for mode in ("stopgrad", "ste", "circuit_ste"):
        config = config_of("mean", reference, backward_mode=mode, head_indices=[1, 2])

        def gradient(model: Any, config: InterventionConfig = config) -> Tensor:
            embeds = reference.get_input_embeddings()(IDS).detach().requires_grad_()
            with FREEZER.freeze_circuits(model, config):
                model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
            model.zero_grad()
            assert embeds.grad is not None
            return embeds.grad * 1000

        yield f"gradient {mode}", gradient


def instruments(reference: Any) -> Results:
    config = InterventionConfig([0], [1, 2], "both", "noise", noise_std=1.0, kv_scope="head")
    yield "record", lambda model: stacked(FREEZER.record(model, IDS))
    yield "record frozen", lambda model: recorded_frozen(model, config)
    yield "calibrate", lambda model: calibrated(model)
    yield "ablation study", lambda model: ablated(model)
    for method in ("exact", "attribution"):
        yield f"score_heads {method}", lambda model, method=method: scored(model, method)
    yield "vector", lambda model: vector(model)
    yield "effect", lambda model: effects(model, config)
    yield "pattern", lambda model: FREEZER.record(model, IDS, pattern=True)[0].pattern
    yield "check_gradient_behavior", lambda model: validation(model, config)
    yield "head_circuits", lambda model: circuits(model)
    yield "copying_scores", lambda model: copying_scores(model).values["copying"]


def validation(model: Any, config: InterventionConfig) -> Tensor:
    passed: bool = FREEZER.check_gradient_behavior(model, IDS, config)["validation_passed"]
    return torch.tensor(float(passed))


def stacked(recording: Any) -> Tensor:
    return torch.cat([getattr(recording[0], role).flatten() for role in ("q", "k", "v", "z")])


def recorded_frozen(model: Any, config: InterventionConfig) -> Tensor:
    with FREEZER.freeze_circuits(model, config):
        return stacked(FREEZER.record(model, IDS))


def calibrated(model: Any) -> Tensor:
    found = FREEZER.calibrate(model, [IDS], progress=False)
    config = InterventionConfig([0], [1], "both", "mean", statistics=found)
    return frozen(model, config)


def ablated(model: Any) -> Tensor:
    table = run_circuit_ablation_study(model, IDS, layers=[0], heads=[1], progress=False).to_frame()
    return torch.tensor(table["effect_size"].to_numpy(float)).nan_to_num()


def scored(model: Any, method: str) -> Tensor:
    found = score_heads(model, IDS, "logit_difference", targets=(5, 7), method=method, progress=False)
    return torch.stack([*found.scores.values()])


def vector(model: Any) -> Tensor:
    found = ExperimentalInterventions().discover_intervention_vector(model, PROMPTS, PROMPTS * 3 % 97, 1, resamples=100)
    return found.vector


def effects(model: Any, config: InterventionConfig) -> Tensor:
    found = FREEZER.verify_intervention_effect(model, model, IDS, config)
    return torch.tensor([one["max"] for one in found["heads"]] + [found["max_absolute_diff"]])


def circuits(model: Any) -> Tensor:
    found = head_circuits(model, 0, 3, fold_norm=True, offsets=(0, 1))
    return torch.stack([found.ov.matrix(), found.qk(0).matrix(), found.qk(1).matrix()])


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("both", "alone"))
    reference = whole(folder)
    variants = [
        ("fsdp2", fsdp2, grid["both"]),
        ("fsdp2 alone", fsdp2, grid["alone"]),
        ("tp_plan", tp_plan, grid["both"]),
        ("parallelized", parallelized, grid["both"]),
        ("parallelized alone", parallelized, grid["alone"]),
        ("heads_gathered", heads_gathered, grid["both"]),
        ("sequence_parallel", sequence_parallel, grid["both"]),
        ("tokens_split", tokens_split, grid["both"]),
    ]
    cases = [*freezes(reference), *gradients(reference), *instruments(reference)]
    wanted = {name: run(reference) for name, run in cases}
    for variant, make, mesh in variants:
        model = make(folder, mesh)
        unfrozen = logits(model)
        for name, run in freezes(reference) if make is tokens_split else cases:
            line: dict[str, Any] = {"variant": variant, "case": name}
            try:
                got = run(model)
                line |= {"error": float((got - wanted[name]).abs().max()), "size": float(wanted[name].abs().max())}
            except CircuitFreezeError as error:
                line["refused"] = f"{type(error).__name__}: {error}"
            except Exception as error:
                line["raised"] = f"{type(error).__name__}: {error}"[:400]
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
        if not torch.equal(logits(model), unfrozen):
            raise AssertionError(f"{variant}: the model is not what it was")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
