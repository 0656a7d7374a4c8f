"""What a freeze costs: a frozen forward beside a plain one, and putting a freeze on and off."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.contenders import twin

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from freeze_core import InterventionConfig

ROWS, TOKENS, ROUNDS = 1, 64, 30

FREEZES: dict[str, dict[str, Any]] = {
    "one_head_ov_zero": {"layer_indices": [0], "head_indices": [0], "circuit": "ov"},
    "all_layers_qk_mean": {"head_indices": [0], "circuit": "qk", "freeze_type": "mean"},
    "all_layers_both_noise_head": {"head_indices": [0], "freeze_type": "noise", "kv_scope": "head"},
}
freezes = pytest.mark.parametrize("freeze", FREEZES)


@pytest.mark.benchmark(group="frozen forward")
@freezes
def bench_frozen_forward(
    benchmark: BenchmarkFixture, circuit_engine: Engine, circuit_model: PreTrainedModel, freeze: str
) -> None:
    """A frozen forward without gradients; before each one, unmeasured by the benchmark, a plain one of a twin
    that has the same weights.

    The two alternate in one process, so that what disturbs the one disturbs the other. `extra_info` has the plain
    median in seconds and the median of the pairs' ratios.
    """
    config = _config(freeze)
    batch = _batch(circuit_model)
    plain_model = twin(circuit_model)
    plain: list[float] = []
    frozen: list[float] = []

    def forward(call: Any, into: list[float]) -> None:
        start = perf_counter()
        call(**batch.arguments(circuit_model))
        _wait(circuit_model)
        into.append(perf_counter() - start)

    with torch.no_grad(), circuit_engine.freeze(circuit_model, config) as call:
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            lambda: forward(call, frozen),
            setup=lambda: forward(plain_model, plain),
            rounds=ROUNDS,
            warmup_rounds=3,
        )
    _describe(benchmark, circuit_engine, circuit_model, config)
    benchmark.extra_info["plain_seconds"] = median(plain)
    benchmark.extra_info["frozen_over_plain"] = median(f / p for f, p in zip(frozen, plain, strict=True))


@pytest.mark.benchmark(group="install and remove")
@freezes
def bench_install_and_remove(
    benchmark: BenchmarkFixture, circuit_engine: Engine, circuit_model: PreTrainedModel, freeze: str
) -> None:
    """Putting a freeze on and taking it off again, without a forward."""
    config = _config(freeze)

    def install_and_remove() -> None:
        with circuit_engine.freeze(circuit_model, config):
            pass

    benchmark.pedantic(install_and_remove, rounds=ROUNDS, warmup_rounds=3)  # type: ignore[no-untyped-call]
    _describe(benchmark, circuit_engine, circuit_model, config)


def _config(freeze: str) -> InterventionConfig:
    from freeze_core import InterventionConfig

    return InterventionConfig(**FREEZES[freeze])


def _batch(model: PreTrainedModel) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=generator))


def _wait(model: PreTrainedModel) -> None:
    """Waits for an accelerator to finish; a CPU has when a call returns."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def _describe(benchmark: BenchmarkFixture, engine: Engine, model: PreTrainedModel, config: InterventionConfig) -> None:
    """Says in the benchmark's own record what was run."""
    import transformers

    benchmark.extra_info.update(
        engine=engine.name,
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_hidden_layers,
        heads=model.config.num_attention_heads,
        freeze={name: str(getattr(config, name)) for name in ("circuit", "freeze_type", "kv_scope", "strength")},
        frozen_layers=config.layer_indices or "all",
        frozen_heads=config.head_indices or "all",
        rows=ROWS,
        tokens=TOKENS,
        dtype=str(model.dtype),
        device=str(model.device),
        attention=model.config._attn_implementation,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
