"""Adapters put the same freezes in force by each library's own means. Run where the library is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_circuitfreeze.suites
from freeze_core import InterventionConfig, InterventionError
from pytest_circuitfreeze.engines import BUILT_IN, EXTRAS, Engine, FreezeCore, load_engine
from pytest_circuitfreeze.models import tiny_model

IDS = torch.tensor([[7, 3, 11, 5], [4, 19, 6, 23]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
ARCHITECTURES = ("gpt2", "llama", "mistral_gqa", "falcon_mqa")


@pytest.fixture(scope="module", params=[name for name in BUILT_IN if name != "freeze_core"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param in EXTRAS:
        pytest.importorskip(request.param, reason=f"the extra of {request.param} is not installed")
    return load_engine(request.param)


def logits(engine: Engine, name: str, **fields: Any) -> torch.Tensor:
    model = tiny_model(name, attn="eager")
    config = InterventionConfig(layer_indices=[0, -1], head_indices=[1, -1], **fields)
    with engine.freeze(model, config) as frozen:
        positions = (MASK.cumsum(-1) - 1).clamp_min(0)
        output = frozen(input_ids=IDS, attention_mask=MASK, position_ids=positions, use_cache=False)
    return output.logits[MASK.bool()]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("circuit", ["q", "k", "v", "both"])
def test_freezes_as_freeze_core_does(engine: Engine, name: str, circuit: str) -> None:
    if engine.name == "pyvene" and name == "falcon_mqa":
        with pytest.raises(InterventionError, match="pyvene maps no head_query_output"):
            logits(engine, name, circuit=circuit)
        return
    for fields in ({}, {"freeze_type": "mean", "strength": 0.5}):
        want = logits(FreezeCore(), name, circuit=circuit, **fields)
        torch.testing.assert_close(logits(engine, name, circuit=circuit, **fields), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "declines"),
    [
        ("llama", {"backward_mode": "circuit_ste"}, ("nnsight", "pyvene", "transformer_lens")),
        ("mistral_gqa", {"kv_scope": "head"}, ("nnsight", "pyvene", "transformer_lens")),
        ("mistral_gqa", {"kv_scope": "head", "circuit": "q"}, ()),
        ("falcon_mqa", {"kv_scope": "head"}, ("hooks", "nnsight", "pyvene", "transformer_lens")),
        ("falcon_mqa", {}, ("pyvene",)),
        ("llama", {"kv_scope": "head", "freeze_type": "noise", "backward_mode": "ste"}, ()),
        ("mamba", {}, ("hooks", "nnsight", "pyvene", "transformer_lens")),
    ],
)
def test_says_what_it_does_not_offer(engine: Engine, name: str, fields: Any, declines: tuple[str, ...]) -> None:
    model, config = tiny_model(name), InterventionConfig(**fields)
    for asked in (config, [InterventionConfig(circuit="q"), config]):
        reason = engine.supports(model, asked)
        assert (reason is not None) == (engine.name in declines)
        if reason is not None:
            assert len(reason.split()) > 3
            with pytest.raises(InterventionError), engine.freeze(model, asked):
                pass


def test_claims_that_are_not_made_are_claims(engine: Engine) -> None:
    files = Path(pytest_circuitfreeze.suites.__file__).parent.glob("test_*.py")
    claims = {name for file in files for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE)}
    assert claims >= set(getattr(engine, "not_offered", {}))
