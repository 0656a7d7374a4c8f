"""The ablation study: each circuit of chosen heads frozen in turn, measured over a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from freeze_core.arguments import check_flag, check_int, refuse
from freeze_core.attention.layout import Sites
from freeze_core.attention.sites import find_sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError
from freeze_core.freezing.install import install, is_frozen
from freeze_core.freezing.plan import LayerFreeze
from freeze_core.freezing.requests import resolve
from freeze_core.generators import Generators
from freeze_core.inputs import logits_of, run
from freeze_core.scoring.batches import IGNORED, Batch, copied
from freeze_core.scoring.sweep import circuits_of
from freeze_core.studies.checks import heads_by_layer
from freeze_core.studies.dataset import batches_in, with_next_tokens
from freeze_core.studies.intervals import Resampling
from freeze_core.studies.measures import Sums, sums
from freeze_core.studies.origin import origin_of
from freeze_core.studies.patches import roles_of
from freeze_core.studies.results import CLEAN, AblationStudy
from freeze_core.vocabulary import CircuitType

__all__ = ["run_circuit_ablation_study"]


def run_circuit_ablation_study(
    model: nn.Module,
    dataset: Any,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    *,
    circuits: Sequence[CircuitType | str] = ("qk", "ov", "both"),
    tokenizer: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    resamples: int = 9_999,
    resampling_seed: int = 0,
    progress: bool = True,
    **fields: Any,
) -> AblationStudy:
    """What freezing each circuit of `heads` in `layers`, all at once, does to the prediction of the next token.

    The model runs as it is, in its own mode, without gradients, once unfrozen and once for each circuit on each
    batch; all passes over a batch draw the same dropout, and torch's generators are put back afterwards.

    Args:
        model: unfrozen; what it was again afterwards, whatever is raised.
        dataset: token ids `[batch, token]`, a dict of model arguments (with an `attention_mask` where there is
            padding), an iterable of either, or a list of texts with their `tokenizer`. Each row is a sequence.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.
        heads: query heads, in the same way; `None` is all of them. Or those of each layer, `{layer: [heads]}`, and then
            `layers` is `None`.
        circuits: `qk`, `ov`, `both`, `q`, `k`, `v`, or `z`, whole heads; each has a row of the result. Under `zero` at
            full strength `both` is `ov`: where nothing is moved it does not matter where a head looks.
        tokenizer: for texts.
        batch_size: how many texts are padded to one length and run at once.
        confidence: of intervals, in (0, 1).
        resamples: how often sequences are drawn anew for an interval, and signs for a test.
        resampling_seed: of these draws.
        progress: show a bar.
        fields: other fields of `InterventionConfig`: `freeze_type`, `kv_scope`, `strength`, `seed`, `noise_std`,
            `statistics`, `reference`, `attention`.

    Raises:
        UnsupportedModelError: the model, or one of its heads, cannot be served.
        InterventionError: an argument that cannot be served, before anything is run; or what a pass cannot serve.
        ImportError: scipy is not installed.

    Example:
        >>> study = run_circuit_ablation_study(model, texts, [0, 1], [3], tokenizer=tokenizer)  # doctest: +SKIP
        >>> print(study.to_markdown())  # doctest: +SKIP
    """
    check_int("batch_size", batch_size, 1)
    check_flag("progress", progress)
    resampling = Resampling(confidence, resamples, resampling_seed)
    names, config = circuits_of(circuits), _config(layers, None if isinstance(heads, Mapping) else heads, fields)
    sites = find_sites(model, attention=config.attention)
    if is_frozen(model):
        raise InterventionError("model is frozen: study it unfrozen, so that the clean run is its own")
    chosen = heads_by_layer(heads, config, sites) if isinstance(heads, Mapping) else None
    if chosen is not None and layers is not None:
        refuse("layers", layers, "None where heads are a dict from layer to heads")
    freezes = {name: _freezes(name, config, sites, chosen) for name in names}
    batches = batches_in(model, dataset, tokenizer, batch_size, name="dataset", least=2)
    if sum(batch.rows for batch in batches) < 2:
        raise InterventionError("dataset has one sequence: must have two at least, for intervals over sequences")
    origin = origin_of(model, sites, batches)  # first, so that nothing that was measured is lost
    batches = with_next_tokens(model, batches)
    measured = _measured(model, sites, batches, freezes, progress)
    targets = torch.cat([(batch.labels != IGNORED).sum(1) for batch in batches if batch.labels is not None])
    return AblationStudy(config, measured, targets, origin, resampling, chosen)


def _config(layers: Any, heads: Any, fields: Mapping[str, Any]) -> InterventionConfig:
    taken = {"layer_indices", "head_indices", "circuit", "backward_mode", "preserve_gradients"}
    allowed = InterventionConfig.__dataclass_fields__.keys() - taken
    unknown = sorted(fields.keys() - allowed)
    if unknown:
        raise InterventionError(
            f"{', '.join(unknown)}: no such argument of a study, which has layers=, heads=, circuits= and "
            f"{', '.join(sorted(allowed))}"
        )
    return InterventionConfig(layers, heads, **fields)


def _freezes(
    circuit: str, config: InterventionConfig, sites: Sites, chosen: Mapping[int, Sequence[int]] | None
) -> list[LayerFreeze]:
    configs = [config]
    if chosen is not None:
        configs = [replace(config, layer_indices=[layer], head_indices=heads) for layer, heads in chosen.items()]
    return [freeze for one in configs for freeze in resolve(one, sites, roles_of(circuit))]


def _measured(
    model: nn.Module,
    sites: Sites,
    batches: Sequence[Batch],
    freezes: Mapping[str, Sequence[LayerFreeze]],
    progress: bool,
) -> dict[str, Sums]:
    """The sums of all sequences, clean and under each circuit's freeze."""
    found: dict[str, list[Sums]] = {name: [] for name in (CLEAN, *freezes)}
    generators = Generators(model)
    before = generators.states()
    try:
        with tqdm(total=len(batches) * len(found), desc="ablation study", unit="pass", disable=not progress) as bar:
            for batch in batches:
                start = generators.states()
                clean = _logits(model, batch)
                after = generators.states()
                found[CLEAN].append(sums(batch, clean, clean))
                bar.update()
                for name, several in freezes.items():
                    generators.put(start)
                    with install([(sites, several)]):
                        found[name].append(sums(batch, _logits(model, batch), clean))
                    bar.update()
                generators.put(after)
    finally:
        generators.put(before)
    whole = {name: Sums(*map(torch.cat, zip(*several, strict=True))) for name, several in found.items()}
    _refuse_infinite(whole)
    return whole


def _refuse_infinite(measured: Mapping[str, Sums]) -> None:
    """Raises `InterventionError` for sums that no mean can be made of."""
    for name, one in measured.items():
        for measure, values in one._asdict().items():
            if not bool(values.isfinite().all()):
                row = int((~values.isfinite()).nonzero()[0])
                raise InterventionError(
                    f"the {measure} of sequence {row} is {float(values[row])} in the {name} run: there is no mean of "
                    "it; leave out what the model holds to be impossible, or run it in a wider dtype"
                )


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits = logits_of(run(model, copied(batch.arguments)))
    if logits.shape[:2] != (batch.rows, batch.columns):
        raise InterventionError(
            f"{type(model).__name__} gave logits {list(logits.shape)} for a batch of {[batch.rows, batch.columns]} "
            "[batch, token]: they must be of every token (no logits_to_keep=)"
        )
    return logits
