"""Tiny models, one for each storage and each kind of head sharing; lets the tests import what lies beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pytest_circuitfreeze.models import tiny_model

sys.path.insert(0, str(Path(__file__).parent))

DEFAULT = ("gpt2", "llama", "mistral_gqa", "falcon_mqa")
STORAGES = (*DEFAULT, "opt", "phi3", "falcon_mha", "falcon_gqa")


@pytest.fixture(params=DEFAULT)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(params=STORAGES)
def any_storage(request):
    return tiny_model(request.param)


@pytest.fixture
def ids():
    return torch.arange(14).view(2, 7) * 5 % 97
