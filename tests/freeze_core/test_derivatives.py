"""Derivatives under a freeze: forward mode equals reverse mode, and every transform of `torch.func` gives the same."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from freeze_core import AttentionCircuitFreezer, InterventionConfig, InterventionError
from freeze_core.freezing.backward import straight_through
from pytest_circuitfreeze.models import tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",  # torch has no batching rule for some kernels
    "ignore:.torch.jit:DeprecationWarning",  # from torch's own rules for tangents
    "ignore:.*should not be instantiated:DeprecationWarning",  # from torch's own compiler
)
FREEZER = AttentionCircuitFreezer()
MODES = ["stopgrad", "ste", "circuit_ste"]
IDS = torch.arange(10).view(2, 5) * 7 % 97
MASK = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])


def draw(like, seed=0):
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def build(name="gpt2"):
    """A model in float64 whose attention has derivatives in forward mode, its embeddings, and parameters of layer 1."""
    model = tiny_model(name).double().requires_grad_(False)
    model.set_attn_implementation("eager")
    parameters = {name: value for name, value in model.named_parameters() if ".1." in name and "att" in name}
    return model, model.get_input_embeddings()(IDS), parameters


def loss(model, parameters, embeddings, **arguments):
    arguments = {"inputs_embeds": embeddings, "use_cache": False, **arguments}
    return functional_call(model, parameters, (), arguments).logits.tanh().square().mean()


def same(found, expected, tolerance=1e-9):
    scale = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_mqa"])
def test_forward_mode_equals_reverse_mode(name, scope, mode):
    """`<u, J t> = <J^T u, t>`, for the input and for a frozen layer's parameters, gradients enabled or not."""
    model, embeddings, parameters = build(name)
    config = InterventionConfig([0, 1], [1], "both", "mean", mode, kv_scope=scope, strength=0.7)
    inputs = {"embeddings": embeddings, **parameters}
    tangents = {name: draw(value, seed) for seed, (name, value) in enumerate(inputs.items())}

    def of(inputs):
        return loss(model, {name: one for name, one in inputs.items() if name != "embeddings"}, inputs["embeddings"])

    # Falcon's attention calls torch's kernels, of which one alone has derivatives in forward mode.
    with FREEZER.freeze_circuits(model, config), sdpa_kernel(SDPBackend.MATH):
        leaves = {name: one.clone().requires_grad_() for name, one in inputs.items()}
        gradients = dict(zip(leaves, torch.autograd.grad(of(leaves), list(leaves.values())), strict=True))
        for name, tangent in tangents.items():
            expected = float((gradients[name] * tangent).sum())
            bound = 1e-6 * float(gradients[name].norm() * tangent.norm())  # rotary positions are float32
            assert abs(expected) > 10 * bound
            found = [jvp(lambda one, name=name: of({**inputs, name: one}), (inputs[name],), (tangent,))[1]]
            with torch.no_grad(), forward_ad.dual_level():
                dual = of({**inputs, name: forward_ad.make_dual(inputs[name], tangent)})
                found.append(forward_ad.unpack_dual(dual).tangent)
            assert [float(one) for one in found] == pytest.approx([expected] * 2, rel=0, abs=bound)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("freeze_type", ["zero", "mean", "noise"])
def test_transforms_of_torch_func_give_the_gradients_of_autograd(freeze_type, mode):
    model, embeddings, parameters = build()
    config = InterventionConfig([0, 1], [1], "both", freeze_type, mode, strength=0.7)

    def by_autograd(row, mask):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        of_row = loss(model, leaves, row, attention_mask=mask)
        return dict(zip(leaves, torch.autograd.grad(of_row, list(leaves.values())), strict=True))

    def of_row(parameters, row, mask):
        return loss(model, parameters, row[None], attention_mask=mask[None])

    tangents = {name: draw(value) for name, value in parameters.items()}
    with FREEZER.freeze_circuits(model, config):
        whole = by_autograd(embeddings, MASK)
        of_all = lambda parameters: loss(model, parameters, embeddings, attention_mask=MASK)  # noqa: E731
        same(grad(of_all)(parameters), whole)
        same(vjp(of_all, parameters)[1](torch.ones((), dtype=torch.float64))[0], whole)
        rows = [by_autograd(row[None], mask[None]) for row, mask in zip(embeddings, MASK, strict=True)]
        expected = {name: torch.stack([row[name] for row in rows]) for name in parameters}
        same(vmap(grad(of_row), (None, 0, 0))(parameters, embeddings, MASK), expected)
        moved = vmap(lambda row, mask: jvp(lambda one: of_row(one, row, mask), (parameters,), (tangents,))[1])
        products = sum((expected[name] * tangents[name]).flatten(1).sum(1) for name in parameters)
        same({"": moved(embeddings, MASK)}, {"": products})


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_are_those_of_two_backward_passes(mode):
    model, embeddings, _ = build()
    directions = torch.stack([draw(embeddings, 1), draw(embeddings, 2)])

    def along(steps):
        return loss(model, {}, embeddings + torch.einsum("i,i...->...", steps, directions))

    zero = torch.zeros(2, dtype=torch.float64)
    with FREEZER.freeze_circuits(model, InterventionConfig([0, 1], [1], "both", "noise", mode, strength=0.7)):
        steps = zero.clone().requires_grad_()
        (first,) = torch.autograd.grad(along(steps), steps, create_graph=True)
        second = torch.stack([torch.autograd.grad(one, steps, retain_graph=True)[0] for one in first])
        same({"": jacrev(along)(zero)}, {"": first.detach()})
        same({"": jacfwd(along)(zero)}, {"": first.detach()})
        same({"": jacrev(jacrev(along))(zero)}, {"": second})
        same({"": hessian(along)(zero)}, {"": second})
    assert second.abs().min() > 0


def test_each_row_under_vmap_is_a_pass_of_its_own():
    """A row alone has no other row to take values from; a mask of padding alone leaves nothing to take a mean of."""
    model, embeddings, _ = build()
    run = vmap(lambda row, mask: model(inputs_embeds=row[None], attention_mask=mask[None], use_cache=False).logits[0])
    rows = zip(embeddings, MASK, strict=True)
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "both", "mean")):
        alone = [
            model(inputs_embeds=row[None], attention_mask=mask[None], use_cache=False).logits[0] for row, mask in rows
        ]
        torch.testing.assert_close(run(embeddings, MASK), torch.stack(alone))
        with pytest.raises(InterventionError, match="no real token"):
            run(embeddings, MASK * torch.tensor([[1], [0]]))
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", "resample")):
        with pytest.raises(InterventionError, match="this pass has 1 row"):
            run(embeddings, MASK)
        vmap(lambda ids: model(ids, use_cache=False).logits)(torch.stack([IDS, IDS + 1]))
        model(IDS)


def test_noise_drawn_under_a_transform_is_kept_as_an_ordinary_tensor():
    model, embeddings, _ = build()
    model.float()
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", "noise")):
        hessian(lambda step: loss(model, {}, embeddings.float() * step))(torch.ones(()))
        under = model(inputs_embeds=embeddings.float()).logits
    with FREEZER.freeze_circuits(model, InterventionConfig([0], [1], "v", "noise")):
        assert torch.equal(model(inputs_embeds=embeddings.float()).logits, under)


ODD = torch.tensor([1.5, -0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38])
PAIRS = torch.cartesian_prod(ODD, ODD).T


def bits(x):
    return x.detach().view(torch.int32).tolist()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_straight_through_estimator_keeps_every_bit_of_the_value(compiled):
    x, value = PAIRS[0].clone().requires_grad_(), PAIRS[1]

    def moved(x, value, tangent):
        return jvp(lambda x: straight_through(x, value), (x,), (tangent,))

    apply = straight_through
    if compiled:
        torch.compiler.reset()
        apply, moved = (torch.compile(one, fullgraph=True, backend="eager") for one in (straight_through, moved))
    found = apply(x, value)
    assert bits(found) == bits(value)
    (gradient,) = torch.autograd.grad(found, x, torch.full_like(x, 0.25))
    finite = x.isfinite() | torch.tensor(not compiled)
    assert torch.equal(gradient, torch.where(finite, 0.25, 0.0))
    primal, tangent = moved(PAIRS[0], value, torch.full_like(value, 0.25))
    assert bits(primal) == bits(value)
    assert torch.equal(tangent, gradient)


def test_transforms_of_the_straight_through_estimator_can_be_compiled():
    """Torch compiles an autograd function as if it had no tangent: the estimator must not be one there."""
    x, tangent = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.25])
    value = torch.tensor([3.0, 2.0])

    def moved(x):
        return jvp(lambda x: straight_through(2 * x, value).square(), (x,), (tangent,))[1]

    def slopes(x):
        return jacrev(lambda x: straight_through(2 * x, value).square())(x)

    torch.compiler.reset()
    assert torch.equal(torch.compile(moved, fullgraph=True, backend="eager")(x), 4 * value * tangent)
    assert torch.equal(torch.compile(slopes, fullgraph=True, backend="eager")(x), torch.diag(4 * value))
    torch.compiler.reset()
