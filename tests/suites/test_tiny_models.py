"""The tiny models leave nothing to hide behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from by_heart import BY_HEART

from pytest_circuitfreeze.models import TINY, tiny_model
from pytest_circuitfreeze.suites.judge.site_lookup import sites

# Types that `shrinking` builds are tested with it.
DRAWN = [*BY_HEART, "falcon_alibi", "qwen"]

IDS = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DRAWN)
def test_no_parameter_is_plain(name: str) -> None:
    for path, parameter in tiny_model(name).named_parameters():
        assert parameter.std() > 0.05, f"{path} hardly varies"
        assert not (parameter == 0).any(), path
        assert not (parameter == 1).any(), path


@pytest.mark.parametrize("name", [*BY_HEART, "falcon_alibi"])  # those that hand their patterns out
def test_patterns_are_sharp_and_heads_differ(name: str) -> None:
    with torch.no_grad():
        attentions = tiny_model(name, attn="eager")(IDS, output_attentions=True).attentions
    late = torch.stack(attentions)[:, :, :, 6:]  # [layer, batch, head, query, key], at least 6 keys a query
    assert late.amax(-1).mean() > 0.5  # 1/6 at most, were they uniform
    for one in range(late.shape[2]):
        for other in range(one):
            assert (late[:, :, one] - late[:, :, other]).abs().amax(-1).mean() > 0.3


@pytest.mark.parametrize("name", BY_HEART)
def test_shape_is_the_promised_one(name: str) -> None:
    found = sites(tiny_model(name))
    assert sorted(found) == [0, 1, 2]
    kv_heads = {"llama_gqa": 2, "llama_70b": 2, "mistral_gqa": 2, "phi3": 2, "falcon_gqa": 2, "falcon_mqa": 1}
    for site in found.values():
        heads, features = (16, 4) if name == "llama_70b" else (4, 8)
        assert site.formula is not None
        shapes = {role: tuple(part.features.shape) for role, part in site.parts.items()}
        kv = (kv_heads.get(name, 4), features)
        assert (site.heads, shapes) == (heads, {"q": (heads, features), "k": kv, "v": kv})


@pytest.mark.parametrize("name", TINY)
def test_every_name_is_a_model_that_the_judge_can_tell(name: str) -> None:
    found = sites(tiny_model(name))
    assert found, name
    assert all(site.heads % site.group == 0 for site in found.values())


def test_a_type_that_has_no_name_of_its_own_is_built_too() -> None:
    assert "glm" not in TINY
    assert tiny_model("glm").config.model_type == "glm"


@pytest.mark.parametrize("name", DRAWN)
def test_weights_follow_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    one, same, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not one.training
    for left, right, third in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
        assert not torch.equal(left, third)


def test_dtype_and_attention_are_as_asked() -> None:
    model = tiny_model("llama", dtype=torch.float64, attn="eager")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no tiny model is called 'gpt3'; there are gpt2, opt, llama"):
        tiny_model("gpt3")


def test_names_are_had_without_torch() -> None:
    code = "import sys, pytest_circuitfreeze.models as m; assert m.TINY; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
