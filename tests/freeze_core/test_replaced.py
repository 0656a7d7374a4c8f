"""What stands in for a module's forward is put in, found, and taken out again, whatever else is on the module."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from freeze_core import CircuitFreezeError, InterventionError
from freeze_core.forward_patch import ForwardPatch, PassPatch, patch_on, patches_on


class OneMore(ForwardPatch):
    def forward(self, x):
        return self.original(x) + 1


class PassOfOneMore(PassPatch):
    def run(self, args, kwargs):
        return self.original(*args, **kwargs) + 1


@pytest.fixture
def module():
    return nn.Hardtanh(-9, 9)  # what it is given


def test_it_is_put_in_and_leaves_no_trace(module):
    held = OneMore(module)
    assert (held.slot(), patch_on(module, OneMore)) == (None, None)
    held.attach()
    assert (held.slot(), patch_on(module, OneMore)) == ("forward", held)
    assert module(torch.ones(())) == 2
    held.refuse_if_covered()
    held.detach()
    assert "forward" not in vars(module)
    assert vars(module).keys() == vars(nn.Hardtanh()).keys()
    assert not patches_on(module)


def test_a_forward_of_the_instance_is_put_back(module):
    held = OneMore(module)
    module.forward = own = lambda x: 2 * x
    held.attach()
    assert module(torch.ones(())) == 3
    held.detach()
    assert vars(module)["forward"] is own


def test_it_is_found_and_taken_out_beneath_a_hook_of_accelerates(module):
    held = OneMore(module)
    held.attach()
    module._old_forward = module.forward
    module.forward = hooked = lambda x: 10 * module._old_forward(x)
    assert (held.slot(), patch_on(module, OneMore)) == ("_old_forward", held)
    assert not held.lost()
    held.refuse_if_covered()
    assert module(torch.ones(())) == 20
    held.detach()
    assert module.forward is hooked
    assert module(torch.ones(())) == 10
    assert not patches_on(module)


def test_one_that_was_thrown_out_is_not_put_back(module):
    held = OneMore(module)
    assert held.lost()  # the module's own forward is there
    held.attach()
    assert not held.lost()
    module.forward = own = type(module).forward.__get__(module)
    assert held.lost()
    held.refuse_if_covered()
    held.detach()
    assert vars(module)["forward"] is own


def test_one_that_is_covered_is_not_taken_out_unseen(module):
    held = OneMore(module)
    held.attach()
    module.forward = lambda x: 5 * x
    assert not held.lost()
    assert patch_on(module, OneMore) is held
    with pytest.raises(
        CircuitFreezeError,
        match=r"forward of a frozen Hardtanh was replaced again, by test_one.*<lambda> \(.*py:\d+\)",
    ):
        held.refuse_if_covered()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_bound_to_its_module(module, copied):
    with pytest.raises(CircuitFreezeError, match="frozen Hardtanh cannot be copied or pickled"):
        copied(OneMore(module))


def test_a_pass_looks_like_the_modules_own(module):
    own = inspect.signature(module.forward)
    held = PassOfOneMore(module)
    held.attach()
    assert inspect.signature(module.forward) == own
    assert list(own.parameters) == ["input"]
    assert patch_on(module, PassOfOneMore) is held
    assert module(input=torch.ones(())) == module(torch.ones(())) == 2


def test_a_pass_within_a_pass_is_refused_and_the_next_one_runs(module):
    held = PassOfOneMore(module)
    module.forward = lambda x: module(x) if x > 5 else x
    held.attach()
    with pytest.raises(InterventionError, match="frozen Hardtanh is running already"):
        module(torch.tensor(7.0))
    assert module(torch.ones(())) == 2
