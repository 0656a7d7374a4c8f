"""Every row of the tables of architectures that the project set out from, each with the head counts of its own model.

Heads have few features and there are two layers, but as many query and KV heads as in the model that a row names. A
row's circuit is judged from outside: the frozen model gives what the model gives whose weights for those heads are
zero, and a freeze of the heads of one KV head leaves the others' patterns alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from plain_freeze import FREEZER, IDS, frozen_logits, logits
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from freeze_core import InterventionConfig, ModelArchitecture
from pytest_circuitfreeze.local_qwen import QWenConfig, build
from pytest_circuitfreeze.models import draw_parameters
from pytest_circuitfreeze.suites.tolerance import nudged

HEAD_DIM = 4
Places = dict[str, list[int]]
"""Positions in the outputs of projections, in units of heads."""
Own = Callable[[int, int], Places]
"""Where q of query head `h` and k and v of KV head `g` are."""


def separate(q: str, k: str, v: str) -> Own:
    return lambda h, g: {q: [h], k: [g], v: [g]}


def all_q_k_v(projection: str, heads: int, kv_heads: int) -> Own:
    return lambda h, g: {projection: [h, heads + g, heads + kv_heads + g]}


def per_head(projection: str) -> Own:
    return lambda h, g: {projection: [3 * h, 3 * h + 1, 3 * h + 2]}


@dataclass(frozen=True)
class Row:
    """One model of the tables: how to build it small, its heads, and where they are stored."""

    config: str
    heads: int
    kv_heads: int
    stored: ModelArchitecture
    own: Own
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "MHA" if self.kv_heads == self.heads else "MQA" if self.kv_heads == 1 else "GQA"

    def build(self, attn: str = "sdpa") -> Any:
        """Two layers, every parameter drawn."""
        fields = {"vocab_size": 97, **_named(self.config, self.heads, self.heads * HEAD_DIM), **self.fields}
        with torch.random.fork_rng(devices=[]):
            if self.config == "QWenConfig":  # its code is not in transformers
                model = build(QWenConfig(**fields), attn)
            else:
                config = getattr(transformers, self.config)(**fields)
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn)
        draw_parameters(model, 0)
        return model.eval()


def _named(config: str, heads: int, width: int) -> dict[str, int]:
    """The sizes, by the names that a config class has for them."""
    if config in ("GPT2Config", "GPTJConfig"):
        return {"n_layer": 2, "n_head": heads, "n_embd": width, "n_positions": 64, "n_inner": 32}
    if config == "BloomConfig":
        return {"n_layer": 2, "n_head": heads, "hidden_size": width}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": heads, "hidden_size": width}
    return sizes if config == "FalconConfig" else {**sizes, "max_position_embeddings": 64}


LLAMA = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SEPARATE, FUSED = ModelArchitecture.SEPARATE_QKV, ModelArchitecture.FUSED_QKV
SMALL = {"intermediate_size": 32}
FALCON = {"ffn_hidden_size": 32, "bias": True, "alibi": False, "multi_query": True}

SUPPORTED = {
    "Llama-2 7B": Row("LlamaConfig", 32, 32, SEPARATE, LLAMA, SMALL),
    "Llama-2 70B": Row("LlamaConfig", 64, 8, SEPARATE, LLAMA, {**SMALL, "num_key_value_heads": 8}),
    "Mistral 7B": Row(
        "MistralConfig", 32, 8, SEPARATE, LLAMA, {**SMALL, "num_key_value_heads": 8, "sliding_window": 4}
    ),
    "Falcon": Row("FalconConfig", 71, 1, FUSED, all_q_k_v("self_attention.query_key_value", 71, 1), FALCON),
    "BLOOM": Row("BloomConfig", 16, 16, FUSED, per_head("self_attention.query_key_value")),
    "OPT": Row("OPTConfig", 12, 12, SEPARATE, LLAMA, {"ffn_dim": 32, "word_embed_proj_dim": 48}),
    "GPT-2": Row("GPT2Config", 12, 12, FUSED, all_q_k_v("attn.c_attn", 12, 12)),
    "GPT-J": Row(
        "GPTJConfig", 16, 16, SEPARATE, separate("attn.q_proj", "attn.k_proj", "attn.v_proj"), {"rotary_dim": 4}
    ),
    "Qwen": Row("QWenConfig", 32, 32, FUSED, all_q_k_v("attn.c_attn", 32, 32), SMALL),
}
"""What the table calls supported. GPT-J is separate, BLOOM and Falcon are fused, whatever the table says."""
IMPLEMENTATIONS = {name: ["sdpa", "eager"] for name in SUPPORTED} | {"BLOOM": ["eager"], "GPT-J": ["eager"]}


def layers_of(model: Any) -> Sequence[nn.Module]:
    base = model.base_model
    found: Sequence[nn.Module] = next(
        getattr(holder, name)
        for holder in (base, getattr(base, "decoder", None))
        for name in ("h", "layers")
        if hasattr(holder, name)
    )
    return found


def without(row: Row, model: Any, layer: int, head: int) -> Any:
    """`model` with the weights zero that make q of `head` and k and v of the KV head that it reads."""
    for path, places in row.own(head, head // (row.heads // row.kv_heads)).items():
        projection: Any = layers_of(model)[layer].get_submodule(path)
        along = -1 if type(projection).__name__ == "Conv1D" else 0
        with torch.no_grad():
            for place in places:
                projection.weight.narrow(along, place * HEAD_DIM, HEAD_DIM).zero_()
                if projection.bias is not None:
                    projection.bias.narrow(0, place * HEAD_DIM, HEAD_DIM).zero_()
    return model


@pytest.mark.parametrize("name", SUPPORTED)
def test_heads_and_storage(name: str) -> None:
    row, model = SUPPORTED[name], SUPPORTED[name].build(IMPLEMENTATIONS[name][0])
    found = FREEZER.get_model_config(model)
    assert (found["num_heads"], found["num_kv_heads"], found["attention_type"]) == (row.heads, row.kv_heads, row.kind)
    assert found["head_dim"] == HEAD_DIM
    assert FREEZER.detect_architecture(model) == found["architecture"] == row.stored


@pytest.mark.parametrize("which", ["first", "middle", "last"])
@pytest.mark.parametrize(("name", "attn"), [(name, attn) for name in SUPPORTED for attn in IMPLEMENTATIONS[name]])
def test_a_frozen_head_is_one_without_weights(name: str, attn: str, which: str) -> None:
    """Q, K and V of any head are where the freeze says they are: bit for bit."""
    row = SUPPORTED[name]
    head = {"first": 0, "middle": row.heads // 2 + 1, "last": row.heads - 1}[which]
    model = row.build(attn)
    got = frozen_logits(model, InterventionConfig([1], [head], "both", "zero"))
    assert torch.equal(got, logits(without(row, row.build(attn), 1, head)))
    assert not torch.equal(got, logits(model))


@pytest.mark.parametrize("name", SUPPORTED)
def test_one_head_alone(name: str) -> None:
    """`kv_scope="head"` spares those that share a KV head: no other head's pattern or z moves but by rounding."""
    row = SUPPORTED[name]
    model = row.build(IMPLEMENTATIONS[name][0])
    head = row.heads // 2
    clean = FREEZER.record(model, IDS, layers=[0])[0]
    moved = FREEZER.record(nudged(model), IDS, layers=[0])[0]
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [head], "both", "mean", kv_scope="head")):
        z = FREEZER.record(model, IDS, layers=[0])[0].z
    others = [other for other in range(row.heads) if other != head]
    bound = (moved.z - clean.z).abs().max()
    assert (z[:, :, others] - clean.z[:, :, others]).abs().max() <= bound
    assert (z[:, :, head] - clean.z[:, :, head]).abs().max() > 2 * bound


@pytest.mark.parametrize("name", SUPPORTED)
def test_qk_and_ov_are_separate(name: str) -> None:
    """QK leaves the values and OV leaves queries, keys and patterns, bit for bit; their sum is both."""
    row = SUPPORTED[name]
    model = row.build("eager")
    clean = FREEZER.record(model, IDS, layers=[0], pattern=True)[0]
    seen = {}
    for circuit in ("qk", "ov", "both"):
        with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], circuit, "noise")):
            seen[circuit] = FREEZER.record(model, IDS, layers=[0], pattern=True)[0]
    assert torch.equal(seen["qk"].v, clean.v)
    assert not torch.equal(seen["qk"].pattern, clean.pattern)
    for activation in ("q", "k", "pattern"):
        assert torch.equal(getattr(seen["ov"], activation), getattr(clean, activation))
        assert torch.equal(getattr(seen["both"], activation), getattr(seen["qk"], activation))
    assert not torch.equal(seen["ov"].v, clean.v)
    assert torch.equal(seen["both"].v, seen["ov"].v)


@pytest.mark.parametrize("name", ["Llama-2 7B", "Llama-2 70B", "OPT", "GPT-2", "Qwen"])
def test_flash_attention(name: str) -> None:
    """Unsupported, says the table: a fused kernel. It reads what the projections give, and so it is served.

    Torch's flash kernel here; the packages that run on a GPU are in `test_implementations.py`.
    """
    row, config = SUPPORTED[name], InterventionConfig([1], [1], "both", "zero")
    model, twin = row.build("sdpa"), without(row, row.build("sdpa"), 1, 1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        frozen = frozen_logits(model, config)
        assert torch.equal(frozen, logits(twin))
        assert not torch.equal(frozen, logits(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xFormers' memory-efficient kernel runs on a GPU only")
@pytest.mark.parametrize("name", ["Llama-2 7B", "GPT-2"])
def test_xformers(name: str) -> None:
    """Unsupported, says the table: an optimised kernel. Torch ships it, as its memory-efficient attention."""
    row, ids = SUPPORTED[name], IDS.cuda()
    model, twin = row.build("sdpa").cuda(), without(row, row.build("sdpa"), 1, 1).cuda()
    with torch.no_grad(), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        with FREEZER.freeze_circuits(model, InterventionConfig([1], [1], "both", "zero")):
            frozen = model(ids, use_cache=False).logits
        assert torch.equal(frozen, twin(ids, use_cache=False).logits)
        assert not torch.equal(frozen, model(ids, use_cache=False).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Llama-2 7B", "Llama-2 70B", "OPT", "BLOOM", "Qwen"])
def test_quantised(name: str) -> None:
    """Unsupported, says the table: no proper hooks. Integer weights, one scale a row: zero rows are zero rows."""
    library = pytest.importorskip("optimum.quanto", reason="the extra 'conditions' is not installed")
    row = SUPPORTED[name]
    attn = IMPLEMENTATIONS[name][0]
    model, twin = row.build(attn), without(row, row.build(attn), 1, 1)
    for each in (model, twin):
        library.quantize(each, weights=library.qint8)
        library.freeze(each)
    frozen = frozen_logits(model, InterventionConfig([1], [1], "both", "zero"))
    assert torch.equal(frozen, logits(twin))
    assert not torch.equal(frozen, logits(model))
