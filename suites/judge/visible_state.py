"""A model's visible state: all that a freeze could leave behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pytest_circuitfreeze.strategies import Batch
from pytest_circuitfreeze.wrapped import device_of, transformers_configs

__all__ = [
    "added",
    "changes",
    "moving",
    "parameters_state",
    "remember_untouched",
    "training_flags",
    "training_flags_kept",
    "visible_state",
    "wrap_forward",
]

_UNTOUCHED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def visible_state(model: PreTrainedModel) -> dict[str, object]:
    """Every attribute, hook, parameter, buffer and class of every module, the configs, and torch's attention functions.

    Tensors are told apart by identity, place in memory, version and a sum of their bits; other objects by identity.
    """
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            where = f"{path or 'model'}.{name}"
            if isinstance(value, Mapping):
                found |= {f"{where}[{key}]": _mark(entry) for key, entry in value.items()}
            else:
                found[where] = _mark(value)
        found[f"{path or 'model'}: its class"] = type(module)
    for kind in {type(module): None for module in model.modules()}:
        found |= {f"{kind.__name__}.{name}": id(value) for name, value in vars(kind).items() if callable(value)}
    for config in transformers_configs(model):
        found[f"{type(config).__name__}: its values"] = repr(config.to_dict()) + config._attn_implementation
    for name in ("scaled_dot_product_attention", "softmax", "linear"):
        found[f"torch.nn.functional.{name}"] = id(getattr(F, name))
    found |= {f"attention function {name}": id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS}
    return found


def remember_untouched(model: PreTrainedModel) -> None:
    """Takes down, once, what there is of a model that no engine has touched, after a pass of its own."""
    if model not in _UNTOUCHED:
        with torch.no_grad():
            model(**Batch(torch.tensor([[1, 2]], device=device_of(model))).arguments(model))
        _UNTOUCHED[model] = frozenset(visible_state(model))


def added(model: PreTrainedModel) -> list[str]:
    """What there is of a model that was not there when no engine had touched it, as far as that is remembered."""
    return sorted(visible_state(model).keys() - _UNTOUCHED[model]) if model in _UNTOUCHED else []


def moving(model: PreTrainedModel, run: Callable[[], object]) -> set[str]:
    """What a pass of the unfrozen model itself moves, by its name in `visible_state`: a recurrent state, say."""
    before = visible_state(model)
    run()
    after = visible_state(model)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def parameters_state(model: nn.Module) -> dict[str, object]:
    """The parameters alone, by name."""
    return {name: _mark(parameter) for name, parameter in model.named_parameters()}


def training_flags(model: nn.Module) -> dict[str, object]:
    """`training` of every module, by name."""
    return {name: module.training for name, module in model.named_modules()}


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Puts every module's `training` back where it was when the block ends."""
    was = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in was:
            module.training = flag


def wrap_forward(module: nn.Module) -> Callable[[], None]:
    """Puts a method around the forward that `module` has now, as a profiler does; what is given takes it off.

    Its signature says nothing of what the forward takes.
    """
    own, on_instance = module.forward, "forward" in vars(module)
    wrapper = MethodType(lambda self, *args, **kwargs: own(*args, **kwargs), module)
    vars(module)["forward"] = wrapper

    def take_off() -> None:
        if vars(module).get("forward") is not wrapper:
            return  # thrown away, with what was beneath it
        if on_instance:
            vars(module)["forward"] = own
        else:
            del vars(module)["forward"]

    return take_off


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """What was added, removed or changed, in words."""
    found = [f"{_called(name)} is new" for name in after if name not in before]
    found += [f"{_called(name)} is gone" for name in before if name not in after]
    found += [f"{_called(name)} changed" for name in before if name in after and before[name] != after[name]]
    return found


def _called(name: str) -> str:
    """Without the number of a hook, which counts all hooks that were ever made."""
    return re.sub(r"\[\d+\]$", "[...]", name)


def _mark(value: object) -> object:
    if isinstance(value, Tensor):
        return (
            id(value),
            value.data_ptr(),
            value._version,
            value.requires_grad,
            value.dtype,
            value.shape,
            _bits(value),
        )
    if isinstance(value, _PLAIN):
        return (type(value), value)
    return id(value)


def _bits(tensor: Tensor) -> int:
    if tensor.is_meta or tensor.numel() == 0:
        return 0
    if hasattr(tensor, "__tensor_flatten__"):  # of a class of its own (quantised, sharded) that holds plain ones
        return sum(_bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum(dtype=torch.int64))
