"""The judge of sweeps: each head's circuit frozen in a whole forward of its own."""

from __future__ import annotations

import torch

from freeze_core import AttentionCircuitFreezer, ExperimentalInterventions, InterventionConfig

FREEZER, WHOLE_HEADS = AttentionCircuitFreezer(), ExperimentalInterventions()


def frozen(model, circuit, layer, head, **fields):
    """The model with one head's circuit frozen; `z` is the whole head."""
    if circuit == "z":
        fields.pop("kv_scope", None)
        return WHOLE_HEADS.freeze_attention_heads(model, {layer: [head]}, **fields)
    return FREEZER.freeze_circuits(model, InterventionConfig([layer], [head], circuit, **fields))


def metric_over(model, batches, metric, at, draws):
    """The metric of each row of all batches, of the logits at the columns `at(batch)` `[row, position]`."""
    torch.manual_seed(draws)
    rows = []
    with torch.no_grad():
        for batch in batches:
            output = model(**batch)
            logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
            columns = at(batch)
            rows.append(metric(logits[torch.arange(len(logits))[:, None], columns]).double())
    return torch.cat(rows)


def one_by_one(model, batches, metric, circuits, at, layers, heads, draws=0, **fields):
    """Scores `[layer, head]` by circuit, of `layers`, each from forwards that draw from the seed `draws` on."""
    clean = metric_over(model, batches, metric, at, draws)
    scores = {}
    for circuit in circuits:
        scores[circuit] = torch.full((max(layers) + 1, heads), torch.nan, dtype=torch.float64)
        for layer in layers:
            for head in range(heads):
                with frozen(model, circuit, layer, head, **fields):
                    change = metric_over(model, batches, metric, at, draws) - clean
                scores[circuit][layer, head] = change.mean()
    return scores
