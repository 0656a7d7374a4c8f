"""An intervention vector: what was found, what it is worth on held-out prompts, and how it is added to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from freeze_core.arguments import check_flag, check_int, is_finite, is_int
from freeze_core.config import check_on_stale_cache
from freeze_core.errors import InterventionError, shown
from freeze_core.files import Saved, as_json, check_values, parsed, under
from freeze_core.freezing.install import FrozenCircuits
from freeze_core.freezing.unfrozen import refuse_frozen
from freeze_core.identity import is_same_model, model_identity
from freeze_core.results.intervals import Estimate, Resampling
from freeze_core.results.provenance import provenance_in
from freeze_core.results.tables import Framed, Printed, Table, interval_columns
from freeze_core.runs.dataset import refuse_single
from freeze_core.scoring.metrics import metric_of
from freeze_core.statistics import digest_of
from freeze_core.vectors.checks import check_columns, check_reached, checked_strengths
from freeze_core.vectors.effects import SteeringEffects, effects_of
from freeze_core.vectors.positions import Positions
from freeze_core.vectors.prompts import Prompts, digests
from freeze_core.vectors.separation import Separation, Stability, separation, stability
from freeze_core.vectors.sites import ResidualSite, find_residual
from freeze_core.vectors.steered import Addition, steer
from freeze_core.vectors.vector_tables import tables_of

__all__ = ["InterventionVector"]


PLAIN = ("layer", "method", "found", "typical_norm", "threshold", "paired", "prompts")
"""Fields that a file has as facts as they are."""


@dataclass(frozen=True, eq=False)
class InterventionVector(Framed, Printed, Saved):
    """A vector of the residual stream after one decoder layer, with what it was found and judged on.

    Args:
        vector: `[hidden]`, float32 (float64 of a model in float64), on the CPU.
        layer: after which decoder layer it is added.
        method: by which it was found.
        found: how many positive and negative prompts it was found on.
        typical_norm: mean length of the stream of those prompts, at the positions that were read.
        held_out: projections on the vector's direction of the held-out positive and negative prompts `[prompt]`, in
            float64, in the stream's unit.
        threshold: the middle of the two mean projections of the prompts that it was found on.
        paired: whether positive and negative prompts are pairs, drawn anew together.
        cosines: of the vectors of two halves of the prompts that it was found on, of each time they were halved.
        losses: of `optimised`, the mean loss at each step, the first before any; of others empty.
        effects: what adding it does to a metric on held-out negative prompts, if one was given.
        prompts: a hash of each prompt that it was found on: it is not judged on those.
        origin: of which model, data and versions.
        resampling: how intervals are made.

    Its frame has one row a strength, or one without effects: how the vector was found, `auc`, `accuracy` and `cosine`
    with their `_low` and `_high`, and the columns of `effects`.
    """

    file_format = "circuitfreeze-intervention-vector-1"
    file_title = "intervention vector"

    vector: Tensor
    layer: int
    method: str
    found: tuple[int, int]
    typical_norm: float
    held_out: tuple[Tensor, Tensor]
    threshold: float
    paired: bool
    cosines: Tensor
    losses: Tensor
    effects: SteeringEffects | None
    prompts: tuple[str, ...]
    origin: Mapping[str, str]
    resampling: Resampling

    @cached_property
    def separation(self) -> Separation:
        """How well held-out prompts are told apart by their projections."""
        return separation(*self.held_out, self.threshold, self.paired, self.resampling)

    @cached_property
    def stability(self) -> Stability:
        """How alike the vectors of halves of the prompts are."""
        return stability(self.cosines, self.resampling.settings["confidence"])

    def apply(
        self,
        model: nn.Module,
        strength: float = 1.0,
        positions: str | Sequence[int] = "all",
        on_stale_cache: str = "warn",
    ) -> FrozenCircuits:
        """Adds `strength * vector` to the residual stream after the layer, until it is removed.

        It keeps the promises of a freeze. Strength 0 is bit for bit the unsteered model; other positions are, too, in
        that layer. After removal, in any order with other vectors and freezes, the model is what it was. It is in
        force or an error. Several vectors after one layer are added in the order in which they were applied.

        With a cache, logits are those without one to rounding: columns count padding and cached tokens. So that this
        holds, `last` and negative columns, which are counted from the end of a pass, are refused in a pass that goes on
        after cached tokens: there they would be other columns than those that the cache was filled with. To steer from
        the last token of a prompt on, while it is continued, give `range(length - 1, 10_000)`.

        Args:
            model: that the vector was found in; neither copied nor changed.
            strength: any finite number; negative ones subtract.
            positions: `all`; `last`, the last real token of each row in each pass, padded on either side; columns,
                padding counted, which must be there and no padding; or a `range` of columns, as far as they are there.
            on_stale_cache: `warn`, `error` or `ignore` a cache that was filled otherwise.

        Returns:
            A context manager that removes it, or `remove()` does.

        Raises:
            UnsupportedModelError: the model cannot be served.
            InterventionError: an argument that cannot be served, or another model; nothing is installed.

        Example:
            >>> with vector.apply(model, strength=2.0):  # doctest: +SKIP
            ...     model.generate(**tokens)
        """
        (number,) = checked_strengths([strength], "strength")
        where = Positions(positions)
        check_on_stale_cache(on_stale_cache)
        site = self._site(model)
        check_columns(site, where)
        delta = None if number == 0 else number * self.vector
        parameter = next(site.module.parameters(), None)
        if delta is not None and parameter is not None:
            dtype = parameter.dtype if parameter.is_floating_point() else delta.dtype
            if not bool(delta.to(dtype).isfinite().all()):
                raise InterventionError(f"strength={shown(strength)}: the vector times that is not finite in {dtype}")
            delta = delta if parameter.is_meta else delta.to(parameter.device)
        key = f"{digest_of([self.vector])} {number} {where}"
        return steer(site, Addition(delta, where, key), on_stale_cache)

    def evaluate(
        self,
        model: nn.Module,
        prompts: Any,
        metric: str | Callable[..., Any],
        strengths: Sequence[float] = (1.0,),
        *,
        targets: Any = None,
        positions: str | Sequence[int] = "all",
        metric_positions: str | Sequence[int] = "last",
        tokenizer: Any = None,
        batch_size: int = 8,
        seed: int = 0,
        progress: bool = True,
    ) -> SteeringEffects:
        """What adding the vector does to a metric on prompts, at each strength, beside random vectors of its length.

        The model runs as it is, in its own mode, without gradients; all passes over a batch draw the same dropout.

        Args:
            model: that the vector was found in, unfrozen.
            prompts: token ids `[prompt, token]`, a dict of model arguments (with an `attention_mask` where there is
                padding), an iterable of either, or a list of texts; none that the vector was found on.
            metric: of the logits at `metric_positions`; as in `score_heads`.
            strengths: distinct finite numbers.
            targets: of a built-in metric; as in `score_heads`.
            positions: where the vector is added; as in `apply`.
            metric_positions: `all`, `last` or columns; as in `score_heads`.
            tokenizer: for texts.
            batch_size: how many texts are padded to one length and run at once.
            seed: of the random vectors.
            progress: show a bar.

        Raises:
            InterventionError: an argument that cannot be served, before anything is run; or what a pass cannot serve.
        """
        where, several = Positions(positions), checked_strengths(strengths)
        check_int("batch_size", batch_size, 1)
        check_int("seed", seed, 0, below=2**63)
        check_flag("progress", progress)
        site = self._site(model)
        check_columns(site, where)
        refuse_frozen(model)
        given = Prompts(model, prompts, "prompts", tokenizer, batch_size)
        refuse_single("prompts", len(given), "prompt")
        batches = given.batches(range(len(given)), metric_positions)
        check_reached(where, given, range(len(given)))
        for number, one in enumerate(digests(batches)):
            if one in self.prompts:
                raise InterventionError(
                    f"prompt {number} of prompts is one that the vector was found on: judge it on others"
                )
        measure = metric_of(metric, targets, batches, model)
        return effects_of(model, site, self.vector, batches, measure, several, where, seed, self.resampling, progress)

    def _site(self, model: nn.Module) -> ResidualSite:
        """The layer in `model`, if that is the model that the vector was found in."""
        site = find_residual(model, self.layer)
        if site.hidden not in (None, len(self.vector)):
            raise InterventionError(
                f"the vector has {len(self.vector)} features, and the stream of {type(model).__name__} {site.hidden}: "
                "apply it to the model that it was found in"
            )
        if not is_same_model(self.origin["identity"], site.sites, "the vector"):
            raise InterventionError(
                f"the vector is of another model ({self.origin['model']}, {self.origin['identity']}, not "
                f"{model_identity(site.sites)}), or of this one with other weights, another dtype or other adapters: "
                "find one in this model"
            )
        return site

    def records(self) -> list[dict[str, Any]]:
        """The rows of the frame."""
        stability = self.stability
        record: dict[str, Any] = {
            "layer": self.layer,
            "method": self.method,
            "norm": float(self.vector.double().norm()),
            "typical_norm": self.typical_norm,
            "n_found_positive": self.found[0],
            "n_found_negative": self.found[1],
            "n_positive": len(self.held_out[0]),
            "n_negative": len(self.held_out[1]),
            **interval_columns("auc", self.separation.auc),
            **interval_columns("accuracy", self.separation.accuracy),
            **interval_columns("cosine", Estimate(*stability[:3])),
            "splits": stability.splits,
        }
        return [record | row for row in (self.effects.records() if self.effects else [{}])]

    def _tables(self) -> list[Table]:
        return tables_of(self)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            "vector": self.vector,
            "positive": self.held_out[0],
            "negative": self.held_out[1],
            "cosines": self.cosines,
            "losses": self.losses,
        }
        facts: dict[str, Any] = {name: getattr(self, name) for name in PLAIN}
        facts |= {"origin": dict(self.origin), "resampling": self.resampling.settings, "effects": None}
        if self.effects:
            tensors |= {f"effects.{name}": getattr(self.effects, name) for name in ("clean", "steered", "controls")}
            facts["effects"] = {name: getattr(self.effects, name) for name in ("metric", "positions", "strengths")}
        return tensors, as_json(facts)

    @classmethod
    def _of_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> InterventionVector:
        values = {name: parsed(text) for name, text in facts.items() if name != "format"}
        resampling, effects = Resampling(**values["resampling"]), None
        if values["effects"] is not None:
            told = values["effects"] | under("effects", tensors)
            told["strengths"] = tuple(map(float, told["strengths"]))
            effects = SteeringEffects(**told, resampling=resampling)
            strengths, prompts = len(effects.strengths), len(effects.clean)
            check_values("effects.clean", effects.clean, None)
            check_values("effects.steered", effects.steered, strengths, prompts)
            check_values("effects.controls", effects.controls, strengths, None, prompts)
        for name in ("positive", "negative", "cosines"):
            check_values(name, tensors[name], None)
        fields: dict[str, Any] = {name: values[name] for name in PLAIN}
        fields |= {name: tuple(values[name]) for name in ("found", "prompts")}
        fields |= {name: tensors[name] for name in ("vector", "cosines", "losses")}
        made = cls(
            **fields,
            held_out=(tensors["positive"], tensors["negative"]),
            effects=effects,
            origin=provenance_in(facts),
            resampling=resampling,
        )
        vector = made.vector
        if vector.dim() != 1 or not vector.is_floating_point() or not bool(vector.isfinite().all()):
            raise ValueError("vector must be finite numbers [hidden]")
        if not is_int(made.layer) or made.layer < 0 or not all(map(is_finite, (made.threshold, made.typical_norm))):
            raise ValueError("layer, threshold and typical_norm must be a layer and finite numbers")
        if "identity" not in made.origin or len(made.found) != 2:
            raise ValueError("there must be a model and numbers of prompts")
        return made
