"""Encoders, and encoders with decoders: what their attention reads under a freeze, against the edit by hand."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
import transformers
from cache_names import CACHE, cache_of
from torch.nn import functional as F

from freeze_core import (
    AttentionCircuitFreezer,
    FreezeNotInForceError,
    InterventionConfig,
    InterventionError,
    UnsupportedModelError,
)
from pytest_circuitfreeze.models import tiny_model
from pytest_circuitfreeze.shrinking_draws import draw

FREEZER = AttentionCircuitFreezer()
HEADS, DIM = 4, 8
IDS = torch.arange(14).view(2, 7) * 5 % 90 + 5
PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
ANSWER_PADDING = torch.tensor([[1] * 4, [1] * 3 + [0]])
SIZES = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "dropout": 0.0,
    "pad_token_id": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
BERT_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
}
T5_SIZES = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}


def built(cls, config):
    model = cls(config).eval()
    draw(model, 0)
    return model


def bert():
    return built(transformers.BertModel, transformers.BertConfig(**BERT_SIZES))


def roberta():
    return built(transformers.RobertaModel, transformers.RobertaConfig(**BERT_SIZES))


def bart():
    return built(transformers.BartForConditionalGeneration, transformers.BartConfig(**SIZES))


def t5():
    config = transformers.T5Config(**T5_SIZES, decoder_start_token_id=0)
    return built(transformers.T5ForConditionalGeneration, config)


def whisper():
    config = transformers.WhisperConfig(**SIZES, num_mel_bins=6, max_source_positions=7, max_target_positions=16)
    return built(transformers.WhisperForConditionalGeneration, config)


def inputs_of(model):
    if isinstance(model, transformers.BertModel | transformers.RobertaModel):
        return {"input_ids": IDS, "attention_mask": PADDING}
    answer = {"decoder_input_ids": IDS[:, :4], "decoder_attention_mask": ANSWER_PADDING, "use_cache": False}
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        sound = torch.linspace(-2, 2, 2 * 6 * 14).view(2, 6, 14).sin()
        return {"input_features": sound, **answer}
    return {"input_ids": IDS, "attention_mask": PADDING, **answer}


NAMES = {
    "bert": ("encoder.layer.{}.attention", ("self.query", "self.key", "self.value")),
    "roberta": ("encoder.layer.{}.attention", ("self.query", "self.key", "self.value")),
    "self bart": ("model.decoder.layers.{}.self_attn", ("q_proj", "k_proj", "v_proj")),
    "cross bart": ("model.decoder.layers.{}.encoder_attn", ("q_proj", "k_proj", "v_proj")),
    "encoder bart": ("model.encoder.layers.{}.self_attn", ("q_proj", "k_proj", "v_proj")),
    "self t5": ("decoder.block.{}.layer.0.SelfAttention", ("q", "k", "v")),
    "cross t5": ("decoder.block.{}.layer.1.EncDecAttention", ("q", "k", "v")),
    "encoder t5": ("encoder.block.{}.layer.0.SelfAttention", ("q", "k", "v")),
    "self whisper": ("model.decoder.layers.{}.self_attn", ("q_proj", "k_proj", "v_proj")),
    "cross whisper": ("model.decoder.layers.{}.encoder_attn", ("q_proj", "k_proj", "v_proj")),
    "encoder whisper": ("model.encoder.layers.{}.self_attn", ("q_proj", "k_proj", "v_proj")),
}
BUILD = {"bert": bert, "roberta": roberta, "bart": bart, "t5": t5, "whisper": whisper}


def consumed(model, path, names):
    """What each projection was given and what attention read of it, by role, and the answer of the model."""
    seen = {}
    attention = model.get_submodule(path)

    def keep(role):
        def hook(module, args, output):
            seen[role] = (F.linear(args[0], module.weight, module.bias), output)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for role, name in zip("qkv", names, strict=True):
            stack.callback(attention.get_submodule(name).register_forward_hook(keep(role)).remove)
        answer = model(**inputs_of(model))
    return seen, answer[0]


def padding_of(kind, role, model):
    """The padding mask of the tokens that this role is made of; sounds have none."""
    if "whisper" in kind and (kind.startswith("encoder") or (kind.startswith("cross") and role != "q")):
        return torch.ones(2, 7, dtype=torch.bool)
    answers = kind.startswith("self") or (kind.startswith("cross") and role == "q")
    return (ANSWER_PADDING if answers else PADDING).bool()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("role", "qkv")
@pytest.mark.parametrize("freeze_type", ["zero", "mean"])
def test_attention_reads_the_replacement_in_the_chosen_head_alone(kind, role, freeze_type):
    model = BUILD[kind.split()[-1]]()
    attention = kind.split()[0] if " " in kind else "self"
    path, names = NAMES[kind][0].format(1), NAMES[kind][1]
    config = InterventionConfig([1], [2], role, freeze_type, attention=attention)
    clean = consumed(model, path, names)[1]
    with FREEZER.freeze_circuits(model, config):
        seen, answer = consumed(model, path, names)
    assert not torch.equal(answer, clean)
    for one, (unfrozen, read) in seen.items():
        expected = unfrozen.clone()
        if one == role:
            chosen = slice(2 * DIM, 3 * DIM)
            real = padding_of(kind, role, model)
            expected[..., chosen] = unfrozen[real].mean(0)[chosen] if freeze_type == "mean" else 0
            # the order of a float32 sum of at most 14 terms
            bound = 14 * 2**-23 * float(unfrozen.abs().max())
            torch.testing.assert_close(read[..., chosen], expected[..., chosen], rtol=0, atol=bound)
            read, expected = (torch.cat([x[..., : 2 * DIM], x[..., 3 * DIM :]], -1) for x in (read, expected))
        assert torch.equal(read, expected)
    assert torch.equal(consumed(model, path, names)[1], clean)


@pytest.mark.parametrize("kind", NAMES)
def test_a_frozen_head_is_one_whose_weights_are_zero(kind):
    model = BUILD[kind.split()[-1]]()
    attention = kind.split()[0] if " " in kind else "self"
    by_hand = copy.deepcopy(model)
    for layer in (0, 1):
        module = by_hand.get_submodule(NAMES[kind][0].format(layer))
        for name in NAMES[kind][1]:
            for parameter in module.get_submodule(name).parameters():
                parameter.data[DIM : 2 * DIM] = 0
    with FREEZER.freeze_circuits(model, InterventionConfig(None, [1], attention=attention)), torch.no_grad():
        assert torch.equal(model(**inputs_of(model))[0], by_hand(**inputs_of(model))[0])


@pytest.mark.parametrize("kind", ["bert", "roberta", "encoder bart", "encoder t5"])
def test_padding_of_an_encoder_plays_no_part_in_a_mean(kind):
    model = BUILD[kind.split()[-1]]()
    config = InterventionConfig([0], freeze_type="mean", circuit="ov", attention="encoder" if " " in kind else "self")
    encoder = model.get_encoder() if " " in kind else model
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        first, second = (
            encoder(input_ids=ids, attention_mask=PADDING)[0][PADDING.bool()]
            for ids in (IDS, torch.where(PADDING.bool(), IDS, IDS + 1))
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("attention", ["self", "cross", "encoder"])
@pytest.mark.parametrize(
    "kwargs", [{"freeze_type": "zero"}, {"freeze_type": "noise", "noise_std": 1.0}], ids=["zero", "noise"]
)
def test_whisper_generates_from_its_cache_as_without(attention, kwargs):
    model = whisper()
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    given = inputs_of(model)
    sound, start = given["input_features"], given["decoder_input_ids"][:, :2]
    config = InterventionConfig([0, 1], [1], "both", attention=attention, **kwargs)
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        cache, steps = None, []
        states = model.get_encoder()(sound)
        tokens = start
        for _ in range(5):
            out = model(
                encoder_outputs=states,
                decoder_input_ids=tokens if cache is None else tokens[:, -1:],
                **{CACHE: cache},
                use_cache=True,
            )
            cache = cache_of(out)
            steps.append(out.logits[:, -1])
            tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], 1)
        whole = model(input_features=sound, decoder_input_ids=tokens[:, :-1], use_cache=False).logits[:, 1:]
        generated = model.generate(sound, decoder_input_ids=start, max_new_tokens=5, do_sample=False, eos_token_id=None)
    # float32 products of 32 features, two layers deep, twice
    bound = 32 * 4 * 2**-23 * float(whole.abs().max())
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=bound)
    assert torch.equal(generated[:, -5:], tokens[:, -5:])


def test_statistics_of_a_cached_step_of_cross_attention_are_refused():
    model = whisper()
    sound = inputs_of(model)["input_features"]
    config = InterventionConfig([0], freeze_type="mean", circuit="q", attention="cross")
    with FREEZER.freeze_circuits(model, config), torch.no_grad():
        out = model(input_features=sound, decoder_input_ids=IDS[:, :2], use_cache=True)
        with pytest.raises(InterventionError, match="after 2 cached tokens"):
            model(input_features=sound, decoder_input_ids=IDS[:, 2:3], **{CACHE: cache_of(out)})


def test_an_encoder_that_holds_the_decoder_is_not_taken_for_it():
    """BLIP-2's `get_encoder` and its `get_decoder` both hold the language model: its layers are the decoder's alone."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = torch.nn.ModuleDict({"language_model": tiny_model("opt"), "eyes": torch.nn.Linear(2, 2)})

        def get_encoder(self):
            return self.whole

        def get_decoder(self):
            return self.whole["language_model"]

        def forward(self, input_ids):
            return self.get_decoder()(input_ids)

    model = Both()
    with pytest.raises(UnsupportedModelError, match="does not say which is its encoder"):
        FREEZER.freeze_circuits(model, InterventionConfig([0], attention="encoder"))
    FREEZER.freeze_circuits(model, InterventionConfig([0])).remove()


def test_a_decoder_that_holds_the_encoder_is_not_taken_for_it():
    """The other way round: layers inside both are the encoder's alone."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = torch.nn.ModuleDict({"eyes": tiny_model("opt"), "language_model": tiny_model("opt")})

        def get_encoder(self):
            return self.whole["eyes"]

        def get_decoder(self):
            return self.whole

    model = Both()
    for attention, part in (("self", "language_model"), ("encoder", "eyes")):
        with FREEZER.freeze_circuits(model, InterventionConfig([0], attention=attention)):
            frozen = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert frozen
        assert all(name.startswith(f"whole.{part}.") for name in frozen)


def test_encoder_states_that_are_projected_with_tokens_before_rows_are_an_error():
    model = bart()
    projection = model.model.decoder.layers[0].encoder_attn.v_proj
    own = projection.forward
    projection.forward = lambda states: own(states).transpose(0, 1)
    freeze = InterventionConfig([0], [1], "v", attention="cross")
    with FREEZER.freeze_circuits(model, freeze), pytest.raises(FreezeNotInForceError, match="taken for tokens"):
        model(**inputs_of(model))


def test_the_eyes_of_a_model_of_words_are_not_frozen_for_its_words():
    eyes = tiny_model("opt").model.decoder
    eyes.main_input_name = "pixel_values"
    model = torch.nn.Module()
    model.eyes, model.main_input_name = eyes, "input_ids"
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        FREEZER.freeze_circuits(model, InterventionConfig([0]))
    model.main_input_name = "pixel_values"
    FREEZER.freeze_circuits(model, InterventionConfig([0])).remove()


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_passes_of_the_encoder_alone_are_no_misses(attention):
    """The decoder is frozen and does not run: nothing is missed, and the encoder is what it was."""
    model = BUILD["bart"]()
    with torch.no_grad():
        want = model.get_encoder()(IDS).last_hidden_state
        with FREEZER.freeze_circuits(model, InterventionConfig(attention=attention)):
            assert torch.equal(model.get_encoder()(IDS).last_hidden_state, want)
