"""Configs resolved against a model, without a forward pass."""

from __future__ import annotations

import pytest

from freeze_core import InterventionConfig, InterventionError
from freeze_core.attention.sites import find_sites
from freeze_core.freezing.plan import assign, storage_for
from freeze_core.freezing.requests import resolve
from pytest_circuitfreeze.models import tiny_model

SITES = find_sites(tiny_model("mistral_gqa"))  # 3 layers, 4 query heads on 2 KV heads


def assigned(*configs, layer=0):
    """For each role, the freeze types of what the four query heads read."""
    freezes = [freeze for config in configs for freeze in resolve(config, SITES) if freeze.layer == layer]
    assignment = assign(SITES.by_layer[layer], freezes)
    return {
        role: [treatment and treatment.replacement.freeze_type.value for treatment in treatments]
        for role, treatments in assignment.items()
    }


def storage(*configs):
    site = SITES.by_layer[0]
    freezes = [freeze for config in configs for freeze in resolve(config, SITES) if freeze.layer == 0]
    return "shared" if storage_for(site, assign(site, freezes)) is site.layout.shared else "unshared"


@pytest.mark.parametrize(
    ("field", "indices", "message"),
    [
        ("layer_indices", [3], "3 is out of range; the model has 3 layers, so -3 to 2 are allowed"),
        ("layer_indices", [-4], "-4 is out of range"),
        ("layer_indices", [0, -3], "names the same one twice"),
        ("head_indices", [4], "4 is out of range; layer 0 has 4 query heads, so -4 to 3 are allowed"),
        ("head_indices", [-5], "-5 is out of range"),
        ("head_indices", [3, -1], "names the same one twice"),
    ],
)
def test_an_index_out_of_range_is_refused(field, indices, message):
    with pytest.raises(InterventionError) as error:
        resolve(InterventionConfig(**{field: indices}), SITES)
    assert message in str(error.value)
    assert str(indices) in str(error.value)


def test_negative_indices_count_from_the_end():
    (freeze,) = resolve(InterventionConfig(layer_indices=[-1], head_indices=[-1, 0]), SITES)
    assert (freeze.layer, freeze.heads) == (2, (3, 0))


def test_none_is_every_layer_and_head():
    freezes = resolve(InterventionConfig(), SITES)
    assert [(freeze.layer, freeze.heads) for freeze in freezes] == [(layer, (0, 1, 2, 3)) for layer in range(3)]


def test_group_scope_reaches_the_neighbours_and_head_scope_does_not():
    one, pair, none = [None, "zero", None, None], ["zero", "zero", None, None], [None] * 4
    assert assigned(InterventionConfig([0], [1], "both")) == {"q": one, "k": pair, "v": pair, "z": none}
    head = assigned(InterventionConfig([0], [1], "both", kv_scope="head"))
    assert head == {"q": one, "k": one, "v": one, "z": none}


def test_kv_heads_are_unshared_only_where_a_group_is_treated_unevenly():
    assert storage(InterventionConfig([0], [1], "ov")) == "shared"
    assert storage(InterventionConfig([0], [1], "q", kv_scope="head")) == "shared"
    assert storage(InterventionConfig([0], [1], "ov", kv_scope="head")) == "unshared"
    assert storage(InterventionConfig([0], [0, 1], "ov", kv_scope="head")) == "shared"
    assert storage(InterventionConfig([0], [1], "ov", kv_scope="head", strength=0)) == "shared"


def test_the_later_config_wins_where_they_meet():
    first, second = InterventionConfig([0], [0, 1], "q", "mean"), InterventionConfig([0], [1, 2], "q", "zero")
    assert assigned(first, second)["q"] == ["mean", "zero", "zero", None]
    assert assigned(second, first)["q"] == ["mean", "mean", "zero", None]


def test_a_later_strength_0_gives_the_unfrozen_activation_back():
    first, second = InterventionConfig([0], [0, 1], "q"), InterventionConfig([0], [1], "q", strength=0)
    assert assigned(first, second)["q"] == ["zero", None, None, None]


def test_a_seed_that_plays_no_part_makes_no_difference():
    one, other = (InterventionConfig([0], [head], "v", seed=head, kv_scope="head") for head in (0, 1))
    assert storage(one, other) == "shared"
