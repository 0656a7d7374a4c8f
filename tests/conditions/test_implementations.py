"""A freeze is the same whichever function computes attention, since it holds what the projections give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plain_freeze import FREEZE_TYPES, FREEZER, IDS, agrees, config_of, frozen_logits, logits, plain, without_heads
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from freeze_core.attention.sites import find_sites
from pytest_circuitfreeze.models import tiny_model

SCOPES = ("group", "head")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("freeze_type", FREEZE_TYPES)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_sdpa(name: str, freeze_type: str, scope: str) -> None:
    config, wanted = plain(name, freeze_type, kv_scope=scope)
    model = tiny_model(name, attn="sdpa")
    agrees(frozen_logits(model, config), logits(model), wanted)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "opt"])
def test_flash_kernel_of_sdpa(name: str, scope: str) -> None:
    """The kernel is forced: where it cannot run, torch raises."""
    config, wanted = plain(name, "mean", kv_scope=scope)
    model = tiny_model(name, attn="sdpa")

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return logits(model)

    agrees(frozen_logits(model, config, flash), flash(), wanted)


# transformers 5.23 builds its mask with a flag that torch 2.13 has deprecated, and torch's compiler scripts a class.
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "scope"), [("llama_gqa", "head"), ("mistral_gqa", "group"), ("opt", "head")])
def test_flex_attention(name: str, scope: str) -> None:
    config, wanted = plain(name, "noise", kv_scope=scope)
    model = tiny_model(name, attn="flex_attention")
    agrees(frozen_logits(model, config), logits(model), wanted)


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """An attention function under the name `of_a_user`; yields the layers that it ran for."""
    ran: list[str] = []

    def attend(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        ran.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("of_a_user", attend)
    AttentionMaskInterface.register("of_a_user", sdpa_mask)
    yield ran
    AttentionInterface._global_mapping.pop("of_a_user")
    AttentionMaskInterface._global_mapping.pop("of_a_user")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_a_function_that_a_user_registered(registered: list[str], name: str, scope: str) -> None:
    config, wanted = plain(name, "mean", kv_scope=scope)
    model = tiny_model(name, attn="of_a_user")
    find_sites(model)  # a probe of which heads the function reads runs it, too
    registered.clear()
    agrees(frozen_logits(model, config), logits(model), wanted)
    assert len(registered) == 2 * 3, "one call a layer in each of the two passes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of flash-attention packages run on a GPU only")
@pytest.mark.parametrize("attn", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_flash_attention_packages(name: str, attn: str) -> None:
    """Freezing zero is the model whose rows for those heads are zero, under the same kernel: bit for bit."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attn]
    pytest.importorskip(package, reason=f"{package}, which is built for one GPU and CUDA, is not installed")
    ids = IDS.cuda()
    model = tiny_model(name, attn=attn, dtype=torch.float16, device="cuda")
    twin = without_heads(name, tiny_model(name, attn=attn, dtype=torch.float16, device="cuda"))
    with torch.no_grad(), FREEZER.freeze_circuits(model, config_of("zero", model)):
        got = model(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(got, twin(ids, use_cache=False).logits)
        assert not torch.equal(got, model(ids, use_cache=False).logits)


def test_each_condition_would_show_a_missing_freeze() -> None:
    """`agrees` refuses the unfrozen logits."""
    config, wanted = plain("llama_gqa", "mean")
    model = tiny_model("llama_gqa", attn="sdpa")
    with pytest.raises(AssertionError, match="off by"):
        agrees(logits(model), logits(model), wanted)
    with pytest.raises(AssertionError, match="only"):
        agrees(frozen_logits(model, config), frozen_logits(model, config), wanted)
