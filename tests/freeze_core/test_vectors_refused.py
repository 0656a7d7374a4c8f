"""What no vector can be found of is refused by name, before any pass where that can be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from discovered import MASK, METRIC, NEGATIVE, POSITIVE, Words, discover

from freeze_core import (
    ExperimentalInterventions,
    InterventionError,
    measure_faithfulness,
    patch_activations,
    run_circuit_ablation_study,
)
from pytest_circuitfreeze.models import tiny_model

FOUR = POSITIVE[:4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positive": torch.empty(0, 7, dtype=torch.long)}, r"positive is empty"),
        ({"negative": []}, r"negative is empty"),
        ({"positive": POSITIVE[:1]}, r"positive has 1 prompt: must have 4 at least, two to find a vector on"),
        ({"negative": NEGATIVE[:3]}, r"negative has 3 prompts: must have 4"),
        ({"positive": "glad"}, r"positive='glad': must be token ids"),
        ({"positive": 3}, r"positive=3: must be token ids"),
        ({"positive": ["1 2", "3"]}, r"tokenizer=None: must be the model's tokenizer, for positive of texts"),
        ({"tokenizer": Words()}, r"tokenizer: must be None for prompts of token ids"),
        (
            {"negative": NEGATIVE[:5], "method": "principal_component"},
            r"positive has 10 prompts and negative 5: must be",
        ),
        ({"positive": torch.cat([FOUR, FOUR])}, r"positive has a prompt several times"),
        ({"negative": torch.cat([NEGATIVE[:5], POSITIVE[3:5]])}, r"2 prompts are both positive and negative"),
        ({"negative": torch.cat([NEGATIVE[:9], POSITIVE[:1]])}, r"1 prompt is both positive and negative"),
        ({"positive": POSITIVE.float()}, r"inputs is torch.float32"),
        ({"layer": 3}, r"layer=3: must be an int in -3 to 2, of 3 layers"),
        ({"layer": -4}, r"layer=-4: must be"),
        ({"layer": True}, r"layer=True: must be"),
        ({"layer": 1.0}, r"layer=1.0: must be"),
        ({"method": "pca"}, r"method='pca': must be one of mean_difference, principal_component, optimised"),
        ({"method": "optimised"}, r"metric=None: must be given with method='optimised'"),
        ({"targets": (1, 2)}, r"targets: must be None without a metric"),
        ({"metric": "accuracy"}, r"metric='accuracy': must be a callable or one of"),
        ({"metric": "logit_difference"}, r"targets=None: metric='logit_difference' takes two"),
        ({"metric": "logit_difference", "targets": (1, 97)}, r"targets=\(1, 97\): must be ids in 0 to 96"),
        ({"metric": "probability", "targets": [1, 2, 3]}, r"targets=\[1, 2, 3\]: must be those of one prompt for all"),
        ({**METRIC, "strengths": []}, r"strengths=\[\]: must be a list of finite numbers"),
        ({**METRIC, "strengths": [1.0, float("nan")]}, r"strengths=nan: must be a finite number"),
        ({**METRIC, "strengths": [1, 1.0]}, r"strengths=\[1, 1.0\]: names the same one twice"),
        ({**METRIC, "strengths": 2.0}, r"strengths=2.0: must be a list"),
        ({"max_norm": 1.0}, r"max_norm=1.0: must be None with method='mean_difference'"),
        ({"steps": 3}, r"steps=3: must be None with method='mean_difference'"),
        ({"method": "optimised", **METRIC, "max_norm": 0.0}, r"max_norm=0.0: must be None or a finite number over 0"),
        ({"method": "optimised", **METRIC, "steps": 0}, r"steps=0: must be None or an int of at least 1"),
        ({"held_out": 0.0}, r"held_out=0.0: must be the share"),
        ({"held_out": 1}, r"held_out=1: must be the share"),
        ({"held_out": float("nan")}, r"held_out=nan: must be the share"),
        ({"seed": -1}, r"seed=-1: must be an int of at least 0"),
        ({"seed": True}, r"seed=True: must be"),
        ({"batch_size": 0}, r"batch_size=0: must be an int of at least 1"),
        ({"progress": 1}, r"progress=1: must be True or False"),
        ({"positions": [7]}, r"positions=\[7\]: 7 is out of range"),
        ({"positions": "first"}, r"positions='first': must be"),
        ({"apply_positions": "first"}, r"positions='first': must be 'all', 'last', a list"),
        ({**METRIC, "metric_positions": [9]}, r"positions=\[9\]: 9 is out of range"),
        ({**METRIC, "apply_positions": [0, 50]}, r"positions=\(0, 50\): 50 is out of range"),
        ({**METRIC, "apply_positions": [0, -7]}, r"positions=\(0, -7\): names the same of 7 columns twice"),
        (
            {**METRIC, "negative": {"input_ids": NEGATIVE, "attention_mask": MASK}, "apply_positions": [0]},
            r"positions=\(0,\): one of them is padding in some prompt of negative",
        ),
        ({"confidence": 2.0}, r"confidence=2.0: must be"),
        ({"resamples": 1}, r"resamples=1: must be"),
    ],
)
def test_what_cannot_be_served_is_an_error_before_any_pass(given: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    own = model.forward
    model.forward = lambda *args, **kwargs: pytest.fail("the model was run")
    model.forward.__func__ = own.__func__
    asked = {"positive": POSITIVE, "negative": NEGATIVE, "layer": 1, "method": "mean_difference", "progress": False}
    with pytest.raises(InterventionError, match=message):
        ExperimentalInterventions().discover_intervention_vector(model, **{**asked, **given})


@pytest.mark.parametrize("module", ["ablation", "patching", "faithfulness", "discovery"])
def test_what_a_result_is_of_is_found_out_before_any_pass(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    own = model.forward
    model.forward = lambda *args, **kwargs: pytest.fail("the model was run")
    model.forward.__func__ = own.__func__
    package = "vectors" if module == "discovery" else "studies"

    def failing(*args: Any) -> None:
        raise LookupError("no version")

    monkeypatch.setattr(f"freeze_core.{package}.{module}.provenance_of", failing)
    calls: dict[str, Any] = {
        "ablation": lambda: run_circuit_ablation_study(model, NEGATIVE, [0], [0], progress=False),
        "patching": lambda: patch_activations(model, POSITIVE, NEGATIVE, **METRIC, progress=False),
        "faithfulness": lambda: measure_faithfulness(model, NEGATIVE, {0: [0]}, **METRIC, progress=False),
        "discovery": lambda: discover(model),
    }
    with pytest.raises(LookupError, match="no version"):
        calls[module]()


def test_texts_of_unequal_length_need_a_pad_token() -> None:
    tokenizer = Words()
    tokenizer.pad_token = None
    with pytest.raises(InterventionError, match="tokenizer has no pad_token"):
        discover(tiny_model("llama"), ["1 2", "3", "4", "5"], ["6", "7", "8", "9"], tokenizer=tokenizer)
    with pytest.raises(InterventionError, match=r"text 1 of negative, '', makes 0 tokens: must make one at least"):
        discover(tiny_model("llama"), ["1 2", "3", "4", "5"], ["6", "", "8", "9"], tokenizer=Words())


def test_prompts_that_do_not_differ_have_no_vector() -> None:
    model = tiny_model("llama")
    alike = torch.cat([POSITIVE[:, :1], NEGATIVE[:, 1:]], dim=1)
    with pytest.raises(InterventionError, match="found a vector that is 0 or not finite"):
        discover(model, POSITIVE, alike, positions=[0])
    with pytest.raises(InterventionError, match="it has no positive side"):
        discover(model, POSITIVE, alike, 1, "principal_component", positions=[0])
