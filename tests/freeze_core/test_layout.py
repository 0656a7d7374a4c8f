"""Feature indices against layouts written out by hand."""

from __future__ import annotations

from freeze_core.attention.layout import fused_layout, plain_layout, widened


def names(layout, width):
    """The feature order as words: `q0` is a feature of query head 0."""
    words = [None] * width
    for role, index in layout.items():
        for head, features in enumerate(index.tolist()):
            for feature in features:
                words[feature] = f"{role}{head}"
    return words


def test_one_block_holds_all_queries_then_all_keys_then_all_values():
    layout = fused_layout(heads=4, kv_heads=2, head_dim=1)
    assert names(layout, 8) == ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]


def test_a_block_a_head_interleaves_the_roles():
    layout = fused_layout(heads=2, kv_heads=2, head_dim=2, blocks=2)
    assert names(layout, 12) == ["q0"] * 2 + ["k0"] * 2 + ["v0"] * 2 + ["q1"] * 2 + ["k1"] * 2 + ["v1"] * 2


def test_a_block_a_group_holds_its_queries_its_key_its_value():
    layout = fused_layout(heads=4, kv_heads=2, head_dim=1, blocks=2)
    assert names(layout, 8) == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_the_order_within_a_block_is_kept():
    layout = fused_layout(heads=4, kv_heads=4, head_dim=1, blocks=2, order=("q", "v", "k"))
    assert names(layout, 12) == ["q0", "q1", "v0", "v1", "k0", "k1", "q2", "q3", "v2", "v3", "k2", "k3"]


def test_widening_gives_each_query_head_the_features_of_its_kv_head():
    shared = fused_layout(heads=4, kv_heads=2, head_dim=2, blocks=2)
    wide = fused_layout(heads=4, kv_heads=4, head_dim=2, blocks=4)
    source = widened(shared, wide)
    for role, index in wide.items():
        for head in range(4):
            origin = head if role == "q" else head // 2
            assert source[index[head]].tolist() == shared[role][origin].tolist()


def test_a_plain_layout_is_head_after_head():
    assert plain_layout(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
