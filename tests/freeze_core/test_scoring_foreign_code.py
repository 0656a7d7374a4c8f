"""Code that is not of torch or transformers makes every pass of a sweep a whole one, whatever its clean pass shows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError, score_heads
from freeze_core.scoring import shared_passes
from freeze_core.scoring.batches import copied
from freeze_core.scoring.known_code import foreign_code
from pytest_circuitfreeze.models import tiny_model

IDS = torch.arange(14).view(2, 7) * 5 % 97


def difference(logits):
    return logits[:, -1, 5] - logits[:, -1, 9]


def assert_right(model, metric=difference, **fields):
    """Every score is that of a whole pass, to rounding."""
    found = score_heads(model, IDS, metric, progress=False, **fields)
    with torch.no_grad():
        clean = difference(model(IDS).logits).double().mean()
        for circuit in ("qk", "ov"):
            for layer in range(3):
                for head in range(4):
                    config = InterventionConfig([layer], [head], circuit, kv_scope="head")
                    with AttentionCircuitFreezer().freeze_circuits(model, config):
                        expected = float(difference(model(IDS).logits).double().mean() - clean)
                    assert float(found.scores[circuit][layer, head]) == pytest.approx(expected, abs=1e-5)


def scaled_in_place(module, args, output):
    output.data.mul_(1.1)


def through_numpy(module, args, output):
    output.detach().numpy()[...] *= 1.1


def mixes_rows_over_a_threshold(module, args, output):
    """Rows are apart in the clean pass: none of its values is as large as those that others have under a freeze."""
    first = output[0] if isinstance(output, tuple) else output
    changed = torch.where(first.amax() > module.threshold, first + first.mean(0, keepdim=True), first)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


HOOKED = {
    "q": ("model.layers.1.self_attn.q_proj", scaled_in_place),
    "k": ("model.layers.1.self_attn.k_proj", scaled_in_place),
    "v": ("model.layers.1.self_attn.v_proj", through_numpy),
    "mlp": ("model.layers.0.mlp", scaled_in_place),
    "unembedding": ("lm_head", through_numpy),
    "norm": ("model.norm", scaled_in_place),
}


@pytest.mark.parametrize("place", HOOKED)
@pytest.mark.parametrize("name", ["llama", "llama_gqa"])
def test_a_hook_that_writes_uncounted_changes_no_score(name, place):
    model = tiny_model(name)
    path, hook = HOOKED[place]
    model.get_submodule(path).register_forward_hook(hook)
    assert_right(model)


def test_a_hook_that_mixes_rows_for_some_values_only_changes_no_score():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    seen = []
    handle = mlp.register_forward_hook(lambda module, args, output: seen.append(float(output.amax())))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    mlp.threshold = seen[0] * 1.001
    mlp.register_forward_hook(mixes_rows_over_a_threshold)
    assert_right(model)


def wrapped(model):
    module = model.model.layers[1].self_attn.q_proj
    original = module.forward

    def forward(x):
        output = original(x)
        output.data.mul_(1.1)
        return output

    module.forward = forward


def of_a_class(model):
    class Projection(torch.nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            output.data.mul_(1.1)
            return output

    model.model.layers[1].self_attn.q_proj.__class__ = Projection


def activation(model):
    mlp = model.model.layers[1].mlp
    function = mlp.act_fn
    del mlp.act_fn
    mlp.act_fn = lambda x: function(x)


def pre_hook(model):
    def scale(module, args):
        args[0].data.mul_(1.1)

    model.model.norm.register_forward_pre_hook(scale)


def partial_hook(model):
    model.lm_head.register_forward_hook(partial(scaled_in_place))


@pytest.mark.parametrize("change", [wrapped, of_a_class, activation, pre_hook, partial_hook])
def test_foreign_code_is_found_and_scores_are_those_of_whole_passes(change):
    model = tiny_model("llama")
    assert foreign_code(model) is None
    change(model)
    assert foreign_code(model) is not None
    assert_right(model)


def test_a_hook_on_all_modules_is_found():
    handle = register_module_forward_hook(lambda module, args, output: None)
    try:
        assert "global hook" in foreign_code(tiny_model("gpt2"))
    finally:
        handle.remove()


def test_a_mode_is_found():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model = tiny_model("gpt2")
    with Mode():
        assert foreign_code(model) == "the mode " + Mode.__qualname__
    with torch.device("cpu"):
        assert foreign_code(model) is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # newer versions rename it
@pytest.mark.parametrize("change", ["checkpointing", "input gradients", "weight norm", "compiled"])
def test_what_torch_and_transformers_put_on_a_model_is_known(change):
    model = tiny_model("llama")
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
    elif change == "input gradients":
        model.enable_input_require_grads()
    elif change == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    else:
        model = torch.compile(model, backend="eager")
    assert foreign_code(model) is None


def test_a_model_without_foreign_code_shares_work(monkeypatch):
    whole = []
    monkeypatch.setattr(shared_passes.SharedPasses, "logits", lambda self, *pass_: whole.append(1))
    score_heads(tiny_model("gpt2"), IDS, difference, positions="last", progress=False)
    assert not whole


def test_a_metric_that_runs_the_scored_model_is_refused():
    """Parts of the model give what they gave in the clean pass meanwhile."""
    model = tiny_model("gpt2")

    def metric(logits):
        with torch.no_grad():
            return difference(logits) + model(IDS + 1).logits[:, 0, 0]

    with pytest.raises(InterventionError, match="run by something else during the sweep, the metric say"):
        score_heads(model, IDS, metric, positions="last", progress=False)
    assert all("forward" not in vars(module) for module in model.modules())


def writes_to_ids(logits, inputs):
    value = difference(logits)
    inputs[:, 0] = 0
    return value


def writes_to_a_dict(logits, inputs):
    value = difference(logits)
    inputs["input_ids"][:, 0] = 0
    inputs["attention_mask"].data.zero_()
    return value


def writes_to_logits(logits):
    value = difference(logits).clone()
    logits.zero_()
    return value


def writes_to_logits_through_numpy(logits):
    value = difference(logits).clone()
    logits.detach().numpy()[...] = 7
    return value


class WritesToCaptured:
    def __init__(self):
        self.ids = IDS.clone()

    def __call__(self, logits):
        self.ids.zero_()
        return difference(logits)


WRITERS = [writes_to_ids, writes_to_a_dict, writes_to_logits, writes_to_logits_through_numpy, WritesToCaptured()]


@pytest.mark.parametrize("method", ["exact", "attribution"])
@pytest.mark.parametrize("metric", WRITERS, ids=lambda metric: getattr(metric, "__name__", "captured"))
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_a_metric_that_writes_to_what_it_is_handed_changes_no_score(name, metric, method):
    if method == "attribution" and metric in (writes_to_logits, writes_to_logits_through_numpy):
        metric = partial(detached_writes, metric)
    model, mask = tiny_model(name), torch.ones_like(IDS)
    batches = [IDS.clone(), IDS.clone()]
    if isinstance(metric, WritesToCaptured):
        metric.ids = IDS.clone()
        batches = [metric.ids, IDS.clone()]
    if metric is writes_to_a_dict:
        batches = [{"input_ids": ids, "attention_mask": mask.clone(), "use_cache": False} for ids in batches]
    before = score_heads(model, copied(batches), difference, method, progress=False)
    found = score_heads(model, batches, metric, method, progress=False)
    assert found.clean == before.clean
    for circuit in before.scores:
        assert torch.equal(found.scores[circuit], before.scores[circuit])


def detached_writes(metric, logits):
    """Writes to the storage of logits that gradients flow through."""
    value = difference(logits)
    metric(logits.data)
    return value
