"""The snippet that a broken claim shows breaks it again in the same way, without pytest."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from broken_engines import architectures_of
from broken_engines.reach import TouchesEverything
from broken_engines.references import ColumnBefore
from broken_engines.storage import CutsInThree
from honest_engine import HookEngine
from snippet_runs import demand_the_same, run, snippet_of
from verdicts import verdict

from freeze_core import AttentionCircuitFreezer, InterventionConfig, UnsupportedModelError
from pytest_circuitfreeze.engines import load_engine
from pytest_circuitfreeze.loading import load_model
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.origins import origin_of
from pytest_circuitfreeze.recordings import recorded
from pytest_circuitfreeze.snippets import Call
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.claims import ClaimBroken
from pytest_circuitfreeze.suites.judge.equivalent_models import equivalent_models
from pytest_circuitfreeze.suites.locality import check_other_heads_are_untouched, check_rows_do_not_matter
from pytest_circuitfreeze.suites.references import check_recordings_are_what_attention_saw
from pytest_circuitfreeze.suites.refusals import Refusing
from pytest_circuitfreeze.suites.removal import check_removal_leaves_no_trace
from pytest_circuitfreeze.suites.storage import check_storage_does_not_matter
from pytest_circuitfreeze.suites.tolerance import nudged

IDS = torch.tensor([[7, 3, 11], [4, 19, 6]])


@pytest.mark.parametrize(
    ("claim", "broken"), [("values_are_the_oracles", ColumnBefore), ("storage_does_not_matter", CutsInThree)]
)
def test_snippet_is_a_program(claim: str, broken: type[HookEngine], tmp_path: Path) -> None:
    engine = load_engine(f"{broken.__module__}:{broken.__name__}")
    known = verdict(claim, engine, tiny_model(architectures_of(broken)[0]), 0).broken
    assert known
    program = tmp_path / "snippet.py"
    program.write_text(snippet_of(known))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, program], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    # Torch and the packages beside it may warn before; nothing comes after.
    assert done.stderr.endswith(f"ClaimBroken: {known}\n\nWithout pytest:\n\n{snippet_of(known)}\n")


def test_snippet_as_a_person_reads_it() -> None:
    engine, small = load_engine("broken_engines.reach:LooksAcross"), tiny_model("gpt2", dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ClaimBroken) as caught:
        check_rows_do_not_matter(engine, small, InterventionConfig([1], [0, 3], strength=0.5), batch=Batch(IDS, mask))
    assert snippet_of(caught.value) == (
        """\
import torch

from freeze_core import InterventionConfig
from pytest_circuitfreeze.engines import load_engine
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.suites.locality import check_rows_do_not_matter

torch.set_num_threads(1)  # sums are rounded otherwise in more or fewer
engine = load_engine("broken_engines.reach:LooksAcross")
model = tiny_model("gpt2", dtype=torch.float64)
config = InterventionConfig(
    layer_indices=[1],
    head_indices=[0, 3],
    strength=0.5,
)
batch = Batch(
    torch.tensor([[7, 3, 11], [4, 19, 6]]),
    attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
)

check_rows_do_not_matter(engine, model, config, batch)
"""
    )


def test_snippet_of_a_run_is_of_its_smallest_example_under_its_conditions(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    words = "--circuitfreeze --circuitfreeze-arch llama_gqa --circuitfreeze-dtype float64 --circuitfreeze-attn eager"
    engine = ("--circuitfreeze-engine", "broken_engines:NextHead", "--circuitfreeze-report", "out")
    result = pytester.runpytest_subprocess(*words.split(), *engine, "-k", "other_heads", "circuitfreeze")
    failed = json.loads((pytester.path / "out" / "report.json").read_text())["results"][0]["failure"]
    assert failed["snippet"].endswith(
        """\
engine = load_engine("broken_engines:NextHead")
model = tiny_model("llama_gqa", dtype=torch.float64, attn="eager")
config = InterventionConfig(layer_indices=[0], head_indices=[0], circuit="ov")
batch = Batch(torch.tensor([[45]]))

check_other_heads_are_untouched(engine, model, config, batch)
"""
    )
    assert result.stdout.str().count(failed["snippet"]) == 1
    again = run(failed["snippet"])
    assert (again.found, again.place) == (failed["found"], failed["place"])


def test_what_cannot_be_written_as_code_is_yours() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    own = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    own.eval()
    freeze = {"layer_indices": [0], "head_indices": [1], "circuit": "ov"}
    statistics = AttentionCircuitFreezer().calibrate(own, [IDS], progress=False)
    config = InterventionConfig(**freeze, freeze_type="mean", statistics=statistics)
    with pytest.raises(ClaimBroken) as caught:
        check_other_heads_are_untouched(TouchesEverything(), own, config, Batch(IDS))
    known = caught.value
    assert "\n  engine: TouchesEverything\n  model: GPT2LMHeadModel\n" in str(known)
    snippet = snippet_of(known)
    assert "\nengine = ...  # yours: TouchesEverything\nmodel = ...  # yours: GPT2LMHeadModel\n" in snippet
    assert "    statistics=...,\n)  # yours: ActivationStatistics\n" in snippet
    for name, start in (("engine", "engine = "), ("model", "model = "), ("statistics", "statistics=")):
        snippet = snippet.replace(f"{start}...", f"{start}my_{name}")
    again = run(snippet, my_engine=TouchesEverything(), my_model=own, my_statistics=statistics)
    demand_the_same(again, known)


def test_a_recording_of_a_model_that_is_yours_is_made_of_it() -> None:
    small = tiny_model("gpt2")
    own = type(small)(small.config).eval()
    held = recorded(own, Batch(IDS), [0])
    config = InterventionConfig([0], [1], circuit="ov", freeze_type="reference", reference=held)
    with pytest.raises(ClaimBroken) as caught:
        check_other_heads_are_untouched(TouchesEverything(), own, config, Batch(IDS))
    assert "reference=recorded(\n        model,\n" in snippet_of(caught.value)


def test_a_refusal_is_reproduced_by_the_check_of_refusals() -> None:
    with pytest.raises(ClaimBroken) as caught:
        check_removal_leaves_no_trace(
            Refusing(load_engine(f"{__name__}:Mute")), tiny_model("gpt2"), InterventionConfig([0]), Batch(IDS)
        )
    known = caught.value
    assert known.sentence == "a refusal names its reason and installs nothing"
    assert f'engine = load_engine("{__name__}:Mute")\n' in snippet_of(known)
    demand_the_same(run(snippet_of(known)), known)


class Mute:
    """Refuses without a reason."""

    name = "mute"

    def freeze(self, model: object, config: object) -> Any:
        raise UnsupportedModelError("")


def test_a_loaded_model_is_loaded_again() -> None:
    origin = origin_of(load_model("test_snippets:factory", dtype=torch.bfloat16, attn="eager"))
    assert origin is not None
    assert origin.arguments() == {"spec": "test_snippets:factory", "dtype": torch.bfloat16, "attn": "eager"}


def factory() -> torch.nn.Module:
    return tiny_model("gpt2")


def test_each_of_several_values_is_the_one_in_its_place() -> None:
    small = tiny_model("gpt2")
    own = equivalent_models(small)
    assert [origin.place for twin in own if (origin := origin_of(twin)) is not None] == [0, 1]
    snippet = Call(check_storage_does_not_matter, {"twin": own[1]}).snippet
    assert '\ntwin = equivalent_models(tiny_model("gpt2"))[1]\n' in snippet


def test_what_was_made_of_a_model_that_is_gone_is_yours() -> None:
    held = recorded(tiny_model("gpt2"), Batch(IDS[:1, :2]))
    gc.collect()
    snippet = Call(check_recordings_are_what_attention_saw, {"recording": held}).snippet
    assert "\nrecording = recorded(..., Batch(torch.tensor([[7, 3]])))  # yours: Gone\n" in snippet


def test_what_is_remembered_keeps_no_model_alive() -> None:
    small = tiny_model("gpt2")
    origins = [origin_of(one) for one in (nudged(small), *equivalent_models(small))]
    assert [origin.arguments()["model"] for origin in origins if origin] == [small] * 3
    gone = ref(small)
    del small
    gc.collect()
    assert gone() is None
