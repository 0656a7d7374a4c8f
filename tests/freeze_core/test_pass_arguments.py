"""Which pass, which padding mask, which cache: what a stack of layers is given under names and in forms of its own."""

from __future__ import annotations

import functools
from collections import deque
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError, StaleCacheWarning
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(16).view(2, 8) * 5 % 97
PADDING = torch.ones_like(IDS)
PADDING[0, :4] = 0
MEAN = InterventionConfig([0], [1], "ov", "mean")
NOISE = InterventionConfig([0], [1], "ov", "noise", noise_std=1.0)
ZERO = InterventionConfig([0], [1], "ov")


class Attention(nn.Module):
    """Causal attention with the usual names of projections; `past` is the layer's cached keys and values."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x, past=None, mask=None):
        q, k, v = (part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        if isinstance(past, DynamicCache):
            k, v = past.update(k, v, self.layer)
        elif past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        seen = seen if mask is None else seen & mask[:, None, None].bool()
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(z.transpose(1, 2).flatten(2)), (k, v)


class Model(nn.Module):
    """Two layers of it; classes that derive say what their arguments are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(97, 32), nn.Linear(32, 97)
        self.layers = nn.ModuleList([Attention() for _ in range(2)])
        for number, layer in enumerate(self.layers):
            layer.layer = number
        self.eval()

    def run(self, ids, past=None, mask=None):
        x, made = self.embed(ids), []
        for number, layer in enumerate(self.layers):
            change, pair = layer(x, past if past is None or isinstance(past, DynamicCache) else past[number], mask)
            x = x + change
            made.append(pair)
        return SimpleNamespace(logits=self.head(x), made=made)


class TakesPairs(Model):
    def forward(self, input_ids, memory=None):
        return self.run(input_ids, memory)


class TakesStackedTensor(Model):
    def forward(self, input_ids, memory=None):
        return self.run(input_ids, None if memory is None else [tuple(layer) for layer in memory])


class TakesObject(Model):
    def forward(self, input_ids, memory=None):
        return self.run(input_ids, None if memory is None else memory.pairs)


class TakesDict(Model):
    def forward(self, input_ids, memory=None):
        return self.run(input_ids, memory)


class Slots:
    """An object without a `__dict__`."""

    __slots__ = ("pairs",)

    def __init__(self, pairs):
        self.pairs = pairs


class Buffers(nn.Module):
    """A cache that is a module."""

    def __init__(self, pairs):
        super().__init__()
        for layer, pair in enumerate(pairs):
            for name, tensor in zip("kv", pair, strict=True):
                self.register_buffer(f"{name}{layer}", tensor)

    @property
    def pairs(self):
        return [(self.k0, self.v0), (self.k1, self.v1)]


class Nested:
    """Keeps each layer's pair three objects deep."""

    def __init__(self, pairs):
        self.layers = [SimpleNamespace(state=SimpleNamespace(pair=pair)) for pair in pairs]

    @property
    def pairs(self):
        return [layer.state.pair for layer in self.layers]


class Rounded:
    """Keeps bytes that floats were rounded to."""

    def __init__(self, pairs):
        self.scale = max(float(tensor.abs().max()) for pair in pairs for tensor in pair) / 127
        self.bytes = [[(tensor / self.scale).round().to(torch.int8) for tensor in pair] for pair in pairs]

    @property
    def pairs(self):
        return [[tensor * self.scale for tensor in pair] for pair in self.bytes]


OTHER_CACHES = {
    "pairs": (TakesPairs, list),
    "deque": (TakesPairs, deque),
    "object with slots": (TakesObject, Slots),
    "module": (TakesObject, Buffers),
    "nested objects": (TakesObject, Nested),
    "rounded": (TakesObject, Rounded),
    "stacked tensor": (TakesStackedTensor, lambda made: torch.stack([torch.stack(pair) for pair in made])),
    "object": (TakesObject, lambda made: SimpleNamespace(pairs=made)),
    "dict": (TakesDict, lambda made: dict(enumerate(made))),
}


@pytest.mark.parametrize("config", [ZERO, NOISE, MEAN], ids=["zero", "noise", "mean"])
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
@pytest.mark.parametrize("form", OTHER_CACHES)
@torch.no_grad()
def test_a_cache_that_counts_no_tokens_is_refused_in_each_form(form, by_name, config):
    kind, make = OTHER_CACHES[form]
    model = kind()
    cache = make(model(IDS[:, :4]).made)
    rounding = {"rtol": 0, "atol": 0.05} if form == "rounded" else {}
    torch.testing.assert_close(model(IDS[:, 4:], cache).logits, model(IDS).logits[:, 4:], **rounding)  # it is one
    with (
        FREEZER.freeze_circuits(model, config),
        pytest.raises(InterventionError, match=r"given memory, a .* of tensors"),
    ):
        model(IDS[:, 4:], memory=cache) if by_name else model(IDS[:, 4:], cache)


@pytest.mark.parametrize("config", [ZERO, NOISE], ids=["zero", "noise"])
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
@torch.no_grad()
def test_a_cache_of_transformers_is_recognised_under_any_name(by_name, config):
    model = TakesPairs()
    unfrozen = DynamicCache()
    model(IDS[:, :4], unfrozen)
    with FREEZER.freeze_circuits(model, config):
        cache = DynamicCache()
        model(IDS[:, :4], memory=cache) if by_name else model(IDS[:, :4], cache)
        step = model(IDS[:, 4:], memory=cache) if by_name else model(IDS[:, 4:], cache)
        torch.testing.assert_close(step.logits, model(IDS).logits[:, 4:])
        with pytest.warns(StaleCacheWarning):
            model(IDS[:, 4:], unfrozen)


CONTAINERS = {
    "tuple": (lambda cache: (cache,), lambda given: given[0]),
    "dict": (lambda cache: {"keys and values": cache}, lambda given: given["keys and values"]),
    "object": (lambda cache: SimpleNamespace(cache=cache), lambda given: given.cache),
    "object with slots": (Slots, lambda given: given.pairs),
    "object in an object": (lambda cache: SimpleNamespace(a=Slots(cache)), lambda given: given.a.pairs),
    "twice in a list": (lambda cache: [cache, torch.zeros(2), cache], lambda given: given[0]),
}


class TakesContainer(Model):
    open = staticmethod(lambda given: given)

    def forward(self, input_ids, memory=None):
        return self.run(input_ids, None if memory is None else self.open(memory))


@pytest.mark.parametrize("config", [ZERO, NOISE], ids=["zero", "noise"])
@pytest.mark.parametrize("container", CONTAINERS)
@torch.no_grad()
def test_a_cache_of_transformers_is_recognised_in_a_container(container, config):
    wrap, unwrap = CONTAINERS[container]
    model = TakesContainer()
    model.open = unwrap
    unfrozen = DynamicCache()
    model(IDS[:, :4], wrap(unfrozen))
    with FREEZER.freeze_circuits(model, config):
        cache = DynamicCache()
        model(IDS[:, :4], wrap(cache))
        torch.testing.assert_close(model(IDS[:, 4:], wrap(cache)).logits, model(IDS).logits[:, 4:])
        with pytest.warns(StaleCacheWarning):
            model(IDS[:, 4:], wrap(unfrozen))


@torch.no_grad()
def test_statistics_of_a_step_are_refused_with_a_cache_in_a_container():
    model, cache = TakesContainer(), DynamicCache()
    model.open = CONTAINERS["object"][1]
    with FREEZER.freeze_circuits(model, MEAN):
        model(IDS[:, :4], SimpleNamespace(cache=cache))
        with pytest.raises(InterventionError):
            model(IDS[:, 4:], SimpleNamespace(cache=cache))


@torch.no_grad()
def test_caches_of_layers_in_a_list_are_refused():
    model = TakesContainer()
    model.open = lambda given: given[0]
    with (
        FREEZER.freeze_circuits(model, ZERO),
        pytest.raises(InterventionError, match=r"was given several caches \(memory \(list\)\)"),
    ):
        model(IDS, [DynamicCache(), DynamicCache()])


class CountsNothing(DynamicCache):
    def get_seq_length(self, layer_idx=0):
        return 0


class NeedsLayer(DynamicCache):
    def get_seq_length(self, layer_idx):
        return super().get_seq_length(layer_idx)


@pytest.mark.parametrize("config", [ZERO, NOISE, MEAN], ids=["zero", "noise", "mean"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [(CountsNothing, "says that it holds no tokens"), (NeedsLayer, "number of its tokens without arguments")],
)
@torch.no_grad()
def test_a_cache_that_does_not_say_how_many_tokens_it_holds_is_refused(kind, reason, config):
    model, cache = TakesPairs(), kind()
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match=reason):
        model(IDS[:, :4], cache)


KEEPING = {
    "attribute": (lambda self: self.kept, lambda self, pair: setattr(self, "kept", pair)),
    "list": (lambda self: self.kept and self.kept[0], lambda self, pair: setattr(self, "kept", [pair])),
    "dict": (lambda self: self.kept and self.kept["now"], lambda self, pair: setattr(self, "kept", {"now": pair})),
    "object": (
        lambda self: self.kept and self.kept.pair,
        lambda self, pair: setattr(self, "kept", SimpleNamespace(pair=pair)),
    ),
    "two buffers": (
        lambda self: None if self.k is None else (self.k, self.v),
        lambda self, pair: (setattr(self, "k", pair[0]), setattr(self, "v", pair[1])),
    ),
}


class KeepsItsKeys(Attention):
    """Keeps keys and values on itself while `use_cache` is set, as code for study often does."""

    def __init__(self, how):
        super().__init__()
        self.look, self.keep = KEEPING[how]
        self.use_cache, self.kept = False, None
        self.register_buffer("k", None)
        self.register_buffer("v", None)

    def forward(self, x, past=None, mask=None):
        output, pair = super().forward(x, self.look(self) if self.use_cache else None, mask)
        if self.use_cache:
            self.keep(self, pair)
        return output, pair


class KeepingModel(Model):
    def __init__(self, how="attribute"):
        super().__init__()
        self.layers = nn.ModuleList([KeepsItsKeys(how) for _ in range(2)])
        self.eval()

    def forward(self, input_ids, use_cache=False):
        for layer in self.layers:
            layer.use_cache = use_cache
        output = self.run(input_ids)
        for layer in self.layers:
            layer.use_cache = False
        return output

    def empty(self):
        for layer in self.layers:
            layer.kept = layer.k = layer.v = None


@pytest.mark.parametrize("config", [ZERO, NOISE, MEAN], ids=["zero", "noise", "mean"])
@pytest.mark.parametrize("how", KEEPING)
@torch.no_grad()
def test_keys_that_attention_keeps_on_itself_are_refused_where_they_grow(how, config):
    model = KeepingModel(how)
    model(IDS[:, :4], use_cache=True)
    step = model(IDS[:, 4:], use_cache=True).logits
    model.empty()
    torch.testing.assert_close(step, model(IDS).logits[:, 4:])  # it is a cache
    with FREEZER.freeze_circuits(model, config):
        model(IDS)
        model(IDS[:, :4], use_cache=True)  # all its tokens are of this pass
        with pytest.raises(InterventionError, match=r"of KeepingModel has grown by the 4 tokens of this pass"):
            model(IDS[:, 4:], use_cache=True)
    model.empty()
    model(IDS[:, :4], use_cache=True)
    with FREEZER.freeze_circuits(model, config), pytest.raises(InterventionError, match="has grown by the 4 tokens"):
        model(IDS[:, 4:], use_cache=True)


class KeepsItsPattern(Attention):
    """Keeps its input and a pattern of the last pass, as research code does."""

    def forward(self, x, past=None, mask=None):
        output, (k, v) = super().forward(x, past, mask)
        self.input, self.pattern = x, torch.zeros(len(x), 4, x.shape[1], k.shape[2])
        return output, (k, v)


@torch.no_grad()
def test_what_attention_keeps_of_the_last_pass_alone_is_not_taken_for_a_cache():
    model = TakesPairs()
    model.layers = nn.ModuleList([KeepsItsPattern() for _ in range(2)])
    for layer, attention in enumerate(model.layers):
        attention.layer = layer
    model.eval()
    with FREEZER.freeze_circuits(model, NOISE):
        for tokens in (2, 4, 8, 1):
            model(IDS[:, :tokens])
        cache = DynamicCache()
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
            model(IDS[:, start:stop], cache)


@torch.no_grad()
def test_two_caches_in_one_pass_are_refused():
    class TakesTwo(Model):
        def forward(self, input_ids, cache=None, other=None):
            return self.run(input_ids, cache)

    model = TakesTwo()
    with (
        FREEZER.freeze_circuits(model, ZERO),
        pytest.raises(InterventionError, match=r"several caches \(cache, other\)"),
    ):
        model(IDS, DynamicCache(), DynamicCache())


@torch.no_grad()
def test_a_cache_in_a_buffer_of_attention_is_refused():
    class KeepsKeys(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(2, 16, 32))

        def forward(self, x, past=None, mask=None):
            self.keys[: len(x), : x.shape[1]] = self.k_proj(x).detach()
            return super().forward(x, past, mask)

    class BufferModel(Model):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([KeepsKeys() for _ in range(2)])

        def forward(self, input_ids):
            return self.run(input_ids)

    model = BufferModel()
    model(IDS)
    frozen = FREEZER.freeze_circuits(model, InterventionConfig([1], None, "ov"))
    with pytest.raises(InterventionError, match=r"keys of BufferModel, a buffer \[2, 16, 32\], was written"):
        model(IDS)
    frozen.remove()
    model(IDS)


class MaskFirst(Model):
    def forward(self, input_ids, pad=None):
        return self.run(input_ids, None, pad)


class TorchName(Model):
    def forward(self, input_ids, src_key_padding_mask=None):
        return self.run(input_ids, None, None if src_key_padding_mask is None else ~src_key_padding_mask)


class NamelessIds(Model):
    def forward(self, x, valid=None):
        return self.run(x, None, valid)


class FourDimensional(Model):
    def forward(self, input_ids, seen=None):
        return self.run(input_ids, None, seen[:, 0, -1])


class TokensByRows(Model):
    def forward(self, input_ids, real=None):
        return self.run(input_ids, None, real.T)


def first(lengths):
    """The padding mask of rows whose last tokens are padding."""
    return torch.arange(8)[None] < torch.as_tensor(lengths)[:, None]


class Lengths(Model):
    def forward(self, input_ids, src_lengths=None):
        return self.run(input_ids, None, first(src_lengths))


class OneDict(Model):
    def forward(self, batch):
        return self.run(batch["input_ids"], None, first(batch["lengths"]))


OTHER_MASKS = {
    "pad": (MaskFirst, PADDING),
    "src_key_padding_mask": (TorchName, PADDING == 0),
    "valid": (NamelessIds, PADDING),
    "seen": (FourDimensional, PADDING[:, None, None].expand(-1, 1, 8, -1)),
    "real": (TokensByRows, PADDING.T.contiguous()),
    "src_lengths": (Lengths, torch.tensor([4, 8])),
}


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
@pytest.mark.parametrize("name", OTHER_MASKS)
@torch.no_grad()
def test_a_mask_under_another_name_is_not_taken_for_no_padding(name, by_name):
    kind, mask = OTHER_MASKS[name]
    model = kind()

    def run():
        return model(IDS, **{name: mask}) if by_name else model(IDS, mask)

    with (
        FREEZER.freeze_circuits(model, MEAN),
        pytest.raises(InterventionError, match=f"{name} .* may say (which|how many) tokens"),
    ):
        run()
    with pytest.raises(InterventionError, match=f"{name} .* may say (which|how many) tokens"):
        FREEZER.record(model, {"x" if kind is NamelessIds else "input_ids": IDS, name: mask})
    for config in (ZERO, NOISE):
        with FREEZER.freeze_circuits(model, config):
            run()


MAY_BE_LENGTHS = r" \[2\] may say how many tokens of each row are not padding: .* pass one, freeze through"


@pytest.mark.parametrize(
    ("kind", "inputs", "name"),
    [
        (Lengths, (IDS, [4, 8]), "src_lengths"),
        (OneDict, ({"input_ids": IDS, "lengths": torch.tensor([4, 8])},), r"batch\['lengths'\]"),
        (OneDict, ({"input_ids": IDS, "lengths": [4, 8]},), r"batch\['lengths'\]"),
    ],
)
@torch.no_grad()
def test_lengths_of_rows_are_not_taken_for_no_padding(kind, inputs, name):
    model = kind()
    with FREEZER.freeze_circuits(model, MEAN), pytest.raises(InterventionError, match=name + MAY_BE_LENGTHS):
        model(*inputs)
    with FREEZER.freeze_circuits(model, NOISE):
        model(*inputs)


class WithTimes(Model):
    def forward(self, input_ids, timesteps, labels, scale, cut):
        return self.run(input_ids)


@torch.no_grad()
def test_other_numbers_of_each_row_are_not_taken_for_lengths():
    model = WithTimes()
    with FREEZER.freeze_circuits(model, MEAN):
        model(IDS, torch.tensor([3, 5]), torch.tensor([0, 1]), torch.tensor([0.5, 0.1]), [1, 2, 3])


def by_lambda(module):
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


def by_partial(module):
    old = module.forward
    module.forward = functools.partial(lambda forward, *args, **kwargs: forward(*args, **kwargs), old)


def by_method(module):
    old = module.forward
    module.forward = MethodType(lambda self, *args, **kwargs: old(*args, **kwargs), module)


def by_wraps(module):
    old = module.forward
    module.forward = functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))


def by_class(module):
    class Timed(type(module)):
        def forward(self, input_ids, *args, **kwargs):
            return super().forward(input_ids, *args, **kwargs)

    module.__class__ = Timed


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
@pytest.mark.parametrize("wrap", [by_lambda, by_partial, by_method, by_wraps, by_class])
@torch.no_grad()
def test_padding_is_known_where_a_forward_was_wrapped_without_its_signature(wrap, by_name):
    config = InterventionConfig([0], [1], "ov", "mean")
    plain, wrapped = tiny_model("llama").model, tiny_model("llama").model
    wrap(wrapped)
    outputs = []
    for model in (plain, wrapped):
        with FREEZER.freeze_circuits(model, config):
            if by_name:
                outputs.append(model(IDS, attention_mask=PADDING).last_hidden_state)
            elif wrap is by_class and model is wrapped:
                with pytest.raises(InterventionError, match=r"argument 1 .* may say which tokens are padding"):
                    model(IDS, PADDING)
                return
            else:
                outputs.append(model(IDS, PADDING).last_hidden_state)
    assert torch.equal(*outputs)
    recordings = [FREEZER.record(model, {"input_ids": IDS, "attention_mask": PADDING}) for model in (plain, wrapped)]
    assert torch.equal(recordings[0].attention_mask, recordings[1].attention_mask)


class PadsInside(Model):
    """Pads its tokens to a multiple of six, as models with windows do."""

    def forward(self, input_ids):
        tokens = input_ids.shape[1]
        output = self.run(F.pad(input_ids, (0, -tokens % 6)))
        output.logits = output.logits[:, :tokens]
        return output


@torch.no_grad()
def test_padding_that_a_model_adds_by_itself_is_not_taken_for_tokens():
    model = PadsInside()
    for config, reason in ((MEAN, "padding is unknown"), (NOISE, "other columns")):
        with FREEZER.freeze_circuits(model, config):
            model(IDS[:, :6])  # there is none
            with pytest.raises(InterventionError, match=f"given 12 columns in a pass of 8 tokens.*{reason}"):
                model(IDS)
    with FREEZER.freeze_circuits(model, ZERO):
        model(IDS)


class Twice(nn.Module):
    """A bi-encoder: one stack, two prompts, one forward."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model("llama")
        self.config = self.inner.config

    def forward(self, input_ids, other_ids):
        first, second = self.inner(input_ids), self.inner(other_ids)
        return SimpleNamespace(logits=first.logits - second.logits.mean(1, keepdim=True))


@pytest.mark.parametrize("tokens", [8, 5], ids=["prompts of one length", "prompts of two lengths"])
@pytest.mark.parametrize("what", ["record", "pattern", "calibrate"])
def test_a_stack_that_runs_twice_in_a_pass_is_not_recorded(what, tokens):
    model, inputs = Twice(), {"input_ids": IDS, "other_ids": IDS[:, :tokens] + 1}
    calls = {
        "record": lambda: FREEZER.record(model, inputs),
        "pattern": lambda: FREEZER.record(model, inputs, pattern=True),
        "calibrate": lambda: FREEZER.calibrate(model, [inputs], progress=False),
    }
    with pytest.raises(InterventionError, match=r"LlamaModel ran 2 times in one forward pass.*inner\.model"):
        calls[what]()


def test_a_stack_that_runs_twice_is_frozen_in_each_run():
    model, inputs = Twice(), {"input_ids": IDS, "other_ids": IDS + 1}
    config = InterventionConfig([0], [1], "ov", "mean")
    with torch.no_grad(), FREEZER.freeze_circuits(model, config):
        whole = model(**inputs).logits
        first, second = (model.inner(ids).logits for ids in inputs.values())
    assert torch.equal(whole, first - second.mean(1, keepdim=True))
