"""The tiny architectures whose families the judge knows by heart."""

from __future__ import annotations

BY_HEART = [
    *("gpt2", "opt", "llama", "llama_gqa", "llama_70b", "mistral_gqa", "phi3"),
    *("falcon_mqa", "falcon_mha", "falcon_gqa"),
]
