"""What a sweep has done so far: saved to a checkpoint, loaded from one, and merged over the processes that share it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freeze_core.errors import InterventionError, shown
from freeze_core.files import parsed, read_file, write_file
from freeze_core.scoring.batch_passes import BatchPasses
from freeze_core.scoring.distributed import Processes
from freeze_core.scoring.fingerprint import Fingerprint, describe_differences

__all__ = ["Progress", "checkpoint_path"]

FORMAT = "circuitfreeze-sweep-1"

SECONDS = 5.0
"""Between two writes of a sweep that goes on."""

ROUNDING = 16
"""By how many units of rounding two clean passes may differ: other products on another machine."""


class Progress:
    """What has been done of one sweep.

    Results are sums over the rows of each batch, float64 on the CPU, nan for what is still to be done. They are added
    up at the end only, in the order of the batches: the table is the same bits, whichever process did what and when.
    The first process alone reads and writes the checkpoint.

    Args:
        batches, interventions: how many the sweep has.
        fingerprint: of the sweep; empty where no other sweep could be taken for it.
        processes: which share it.
        path: of the checkpoint, `None` for none.

    Raises:
        InterventionError: the checkpoint is invalid or of another sweep, or other processes run another sweep.
    """

    def __init__(
        self, batches: int, interventions: int, fingerprint: Fingerprint, processes: Processes, path: Path | None = None
    ) -> None:
        self._processes = processes
        self._path = path if processes.rank == 0 else None
        self._fingerprint = fingerprint
        self._saved = time.monotonic()
        self._unsent: list[tuple[int, int, float]] = []
        shapes = {"changes": (batches, interventions), **dict.fromkeys(("clean", "sizes", "drawn"), (batches,))}
        self._tensors = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in shapes.items()}
        """By their names in a checkpoint: `changes` of the metric under each intervention, the `clean` metric, the
        `sizes` of the clean logits (their norms), and what the clean pass has `drawn`, see `Generators.drawn`."""
        if self._path and self._path.exists():
            self._tensors = _load(self._path, fingerprint, self._tensors)
        processes.exchange({"fingerprint": fingerprint, "tensors": self._as_lists()}, self._begin_as_the_first)

    @property
    def done(self) -> int:
        """How many changes are known."""
        return int((~self._tensors["changes"].isnan()).sum())

    def missing(self, batch: int) -> set[int]:
        """The interventions that are still to be run over a batch."""
        return set(self._tensors["changes"][batch].isnan().nonzero().flatten().tolist())

    def change(self, intervention: int, rows: int) -> float:
        """What an intervention changes, the mean over all `rows`."""
        return float(sum(self._tensors["changes"][:, intervention].tolist())) / rows

    def clean_mean(self, rows: int) -> float:
        """The metric of the clean passes, the mean over all `rows`."""
        return float(sum(self._tensors["clean"].tolist())) / rows

    def begin(self, batch: int, clean: Tensor, passes: BatchPasses) -> None:
        """Adds the metric `[row]` of the clean pass, and what distinguishes this pass from others.

        Raises:
            InterventionError: the checkpoint was begun with another clean pass.
        """
        values = {"clean": float(clean.sum())}
        if self._fingerprint:
            values |= {"sizes": _norm(passes.clean), "drawn": passes.drawn}
            self._bound = ROUNDING * torch.finfo(passes.clean.dtype).eps
            before = self._clean_values(batch)
            if not math.isnan(before["sizes"]):
                self._refuse_another_pass(batch, before, values, "checkpoint")
                return
        for name, value in values.items():
            self._tensors[name][batch] = value

    def add(self, batch: int, intervention: int, change: float) -> None:
        """Adds what this process has done, and saves all if that was not done lately."""
        self._unsent.append((batch, intervention, change))
        self._tensors["changes"][batch, intervention] = change
        if time.monotonic() - self._saved > SECONDS:
            self.save()

    def merge(self, batch: int) -> int:
        """Exchanges what was done since with the other processes: how many changes they did.

        Raises:
            InterventionError: another process failed, or its clean pass gave something else.
        """
        before, values = self.done, self._clean_values(batch)
        first, *others = self._processes.exchange({"changes": self._unsent, **values}, self._receive)
        for other in others:
            self._refuse_another_pass(batch, first, other, "distributed")
        self._tensors["clean"][batch] = first["clean"]
        return self.done - before

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Saves at the end, whatever is raised; an error is reported to the other processes."""
        try:
            yield
            self.save()
        except BaseException as error:
            self._processes.report_failure(error, {"changes": self._unsent}, self._receive)
            self.save()
            raise

    def save(self) -> None:
        """Writes the checkpoint, if there is one.

        Raises:
            InterventionError: it cannot be written; the one before is still there.
        """
        if not self._path:
            return
        try:
            write_file(self._path, FORMAT, self._tensors, {"question": json.dumps(self._fingerprint)})
        except OSError as error:
            raise _invalid(self._path, f"cannot be written ({error})") from error
        self._saved = time.monotonic()

    def _as_lists(self) -> dict[str, Any] | None:
        """The tensors as JSON, none of which loses a bit; of the first process alone."""
        return {name: one.tolist() for name, one in self._tensors.items()} if self._processes.rank == 0 else None

    def _begin_as_the_first(self, messages: Sequence[Any]) -> None:
        if any("failed" in one for one in messages):
            return
        first = messages[0]
        for rank, one in enumerate(messages):
            if one["fingerprint"] != first["fingerprint"]:
                raise InterventionError(
                    "distributed: the processes are asked different things: what differs between process 0 and process "
                    f"{rank}: {describe_differences(first['fingerprint'], one['fingerprint'])}; give all of them the "
                    "same model, inputs and arguments"
                )
        self._tensors = {name: torch.tensor(one, dtype=torch.float64) for name, one in first["tensors"].items()}

    def _receive(self, messages: Sequence[Any]) -> None:
        self._unsent = []
        for batch, intervention, change in (change for one in messages for change in one.get("changes", ())):
            self._tensors["changes"][batch, intervention] = change

    def _clean_values(self, batch: int) -> dict[str, float]:
        return {name: float(self._tensors[name][batch]) for name in ("clean", "sizes", "drawn")}

    def _refuse_another_pass(
        self, batch: int, first: Mapping[str, float], other: Mapping[str, float], source: str
    ) -> None:
        """Raises `InterventionError` where two clean passes over a batch are not the same.

        Args:
            source: of which argument the error is: `checkpoint` or `distributed`.
        """
        where = {"checkpoint": "when it was begun", "distributed": "in every process"}[source]
        if first["drawn"] != other["drawn"]:
            raise InterventionError(
                f"{source}: the passes over batch {batch} draw (dropout) from other states of torch's generators: call "
                f"torch.manual_seed with the same seed as {where}"
            )
        reasons = {
            "sizes": ("norm of the clean logits", "another model (hooks and adapters, too)"),
            "clean": ("metric of the clean pass, in sum,", "another metric of the same name"),
        }
        for name, (what, reason) in reasons.items():
            if first[name] != other[name] and not math.isclose(first[name], other[name], rel_tol=self._bound):
                raise InterventionError(
                    f"{source}: the {what} over batch {batch} is {first[name]:.9g} and {other[name]:.9g}, and must be "
                    f"the same as {where}: this is {reason}; use the same one, or another checkpoint"
                )


def checkpoint_path(path: str | PathLike[str]) -> Path:
    """The path of a checkpoint, which need not exist yet.

    Raises:
        InterventionError: no file can be there.
    """
    if not isinstance(path, str | PathLike):
        raise InterventionError(f"checkpoint={shown(path)}: must be None or the path of a file")
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise InterventionError(f"checkpoint={shown(str(path))}: must be a file's path, in a folder that is there")
    return Path(path)


def _load(path: Path, fingerprint: Fingerprint, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which have the shapes of `empty`."""
    tensors, facts = read_file(path, FORMAT, "checkpoint")
    try:
        saved = parsed(facts["question"])
    except (KeyError, ValueError) as error:
        raise _invalid(path, f"does not say what it is of ({error!r})") from error
    if saved != fingerprint:
        differences = describe_differences(saved, fingerprint)
        raise _invalid(path, f"of another sweep; what differs, there and here: {differences}")
    if _shapes(tensors) != _shapes(empty):
        raise _invalid(path, f"holds {_shapes(tensors)}, must be {_shapes(empty)}")
    return tensors


def _invalid(path: Path, reason: str) -> InterventionError:
    return InterventionError(
        f"checkpoint of {path}: {reason}; give the path of a checkpoint of this sweep, or of no file yet"
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{one.dtype} {list(one.shape)}" for name, one in sorted(tensors.items())}


def _norm(logits: Tensor) -> float:
    """The norm of what is finite or infinite in `logits` `[row, position, word]`, a row in float64 at a time."""
    rows = (row.double() for row in logits)
    return math.hypot(*(float(torch.where(row.isnan(), 0, row).norm()) for row in rows))
