"""A tiny BART, whose dropout is no part of what is tested."""

from __future__ import annotations

import transformers

from pytest_circuitfreeze.models import draw_parameters


def bart():
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        dropout=0.0,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    draw_parameters(model, 0)
    return model
