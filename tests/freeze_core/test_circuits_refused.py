"""What a head's circuits cannot be told of is refused by name, when it is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn

from freeze_core import (
    AttentionCircuitFreezer,
    HeadCircuits,
    InterventionConfig,
    InterventionError,
    UnsupportedModelError,
    copying_scores,
    head_circuits,
)
from pytest_circuitfreeze.models import tiny_model


@pytest.mark.parametrize("name", ["ernie", "rembert", "modernbert-decoder"])
def test_a_head_of_more_than_a_norm_and_an_unembedding_has_no_copying(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="is not what the last layer gives: something else comes between"):
        copying_scores(tiny_model(name))


def test_a_stream_that_is_scaled_before_the_unembedding_is_not_taken_for_the_stream() -> None:
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    with pytest.raises(UnsupportedModelError, match="something else comes between"):
        copying_scores(model)


def test_what_is_no_matrix_is_refused_when_it_is_asked_for() -> None:
    normed = head_circuits(tiny_model("qwen3"), 1, 0)
    with pytest.raises(UnsupportedModelError, match="is not bilinear in query and key"):
        normed.qk()
    assert normed.ov.matrix().shape == (32, 32)
    with pytest.raises(UnsupportedModelError, match=r"changes by 41.69"):  # 50 tanh(60 / 50)
        head_circuits(tiny_model("gemma2"), 1, 0).qk()
    spanned = head_circuits(tiny_model("olmo2"), 1, 0)
    with pytest.raises(UnsupportedModelError, match=r"q_proj of .*, a Olmo2RMSNorm, reads something else"):
        spanned.qk()
    assert spanned.ov.matrix().shape == (32, 32)
    with pytest.raises(UnsupportedModelError, match=r"kv_b_proj of .* reads something else .* v has no matrix"):
        _ = head_circuits(tiny_model("deepseek_v3"), 1, 0).ov
    with pytest.raises(UnsupportedModelError, match=r"z of head 0 of .* is not its pattern times its values"):
        _ = head_circuits(tiny_model("qwen3_next"), 2, 0).ov
    with pytest.raises(UnsupportedModelError, match="is not its pattern times its values"):
        copying_scores(tiny_model("qwen3_next"))
    with pytest.raises(UnsupportedModelError, match="no norm in layer 1 makes"):
        head_circuits(tiny_model("olmo2"), 1, 0, fold_norm=True)


def test_where_no_pattern_is_heard_weights_are_told_all_the_same() -> None:
    circuits = head_circuits(tiny_model("openai-gpt"), 0, 0)
    assert circuits.W_Q.shape == circuits.W_K.shape == (32, 8)
    for circuit in (circuits.qk, lambda: circuits.ov):
        with pytest.raises(UnsupportedModelError, match=r"formed 0 patterns in a pass|gave no pattern in this pass"):
            circuit()
    with pytest.raises(UnsupportedModelError, match="gave no pattern in this pass"):
        copying_scores(tiny_model("openai-gpt"))


def test_what_is_read_through_more_than_a_norm_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a Qwen4ExpTextGatedResidual gives a tuple: it is no map"):
        _ = head_circuits(tiny_model("qwen4_exp_text"), -1, 0, fold_norm=True).W_Q
    with pytest.raises(UnsupportedModelError, match="reads 64 features where words are embedded in 32"):
        copying_scores(tiny_model("zamba"))


class Bent(nn.Module):
    """A projection that is not linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.out_features, self.in_features = inner.out_features, inner.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def test_a_projection_that_is_not_linear_has_no_matrix() -> None:
    model: Any = copy.deepcopy(tiny_model("llama"))
    attention = model.model.layers[1].self_attn
    attention.v_proj, attention.o_proj = Bent(attention.v_proj), Bent(attention.o_proj)
    circuits = head_circuits(model, 1, 0)
    for name in ("W_V", "W_O"):
        with pytest.raises(UnsupportedModelError, match="a Bent is not linear"):
            getattr(circuits, name)
    assert circuits.qk().matrix().shape == (32, 32)
    assert bool(copying_scores(model).values["copying"][1].isnan().all())
    with pytest.raises(UnsupportedModelError, match="a Bent is not linear"):
        copying_scores(model, [1])


class Evened(nn.Module):
    """A norm that divides by the mean size instead of its root mean square."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + 1e-6)


def test_a_norm_that_divides_by_something_else_is_not_folded() -> None:
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.model.layers[1].input_layernorm = Evened(model.model.layers[1].input_layernorm)
    with pytest.raises(UnsupportedModelError, match="a Evened divides by something else than a root mean square"):
        _ = head_circuits(model, 1, 0, fold_norm=True).W_Q
    assert head_circuits(model, 1, 0).W_Q.shape == (32, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((9, 0), {}, "layer_indices"),
        ((0, 4), {}, "head_indices"),
        ((True, 0), {}, "layer=True: must be an int"),
        ((0, 1.0), {}, r"head=1\.0: must be an int"),
        ((0, 0), {"offsets": ()}, r"offsets=\(\): must be a sequence of distinct ints"),
        ((0, 0), {"offsets": [1, 1]}, r"offsets=\[1, 1\]"),
        ((0, 0), {"offsets": 1}, "offsets=1"),
        ((0, 0), {"offsets": [0.5]}, r"offsets=\[0.5\]"),
        ((0, 0), {"fold_norm": 1}, "fold_norm=1"),
        ((0, 0), {"attention": "sideways"}, "attention='sideways'"),
    ],
)
def test_bad_input_is_an_error_before_any_pass(args: Any, options: dict[str, Any], message: str) -> None:
    model = tiny_model("gpt2")
    model.forward = None
    with pytest.raises(InterventionError, match=message):
        head_circuits(model, *args, **options)


def test_what_is_not_seen_or_not_asked_for_is_an_error() -> None:
    with pytest.raises(InterventionError, match=r"offset=-1: a query of .* sees no key there"):
        head_circuits(tiny_model("gpt2"), 0, 0, offsets=[-1])
    with pytest.raises(InterventionError, match=r"offset=6: a query of .* sees no key there"):
        head_circuits(tiny_model("mistral_gqa"), 0, 0, offsets=[6])
    circuits: HeadCircuits = head_circuits(tiny_model("mistral_gqa"), 0, 0, offsets=[5])
    with pytest.raises(InterventionError, match="offset=0: must be one that head_circuits was given: 5"):
        circuits.qk()
    model = tiny_model("gpt2")
    with AttentionCircuitFreezer().freeze_circuits(model, InterventionConfig()):
        for call in (lambda: head_circuits(model, 0, 0), lambda: copying_scores(model)):
            with pytest.raises(InterventionError, match="model is frozen"):
                call()
