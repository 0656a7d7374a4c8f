"""The file in which a sweep keeps what it has done, so that the same sweep goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from freeze_core.errors import InterventionError, shown
from freeze_core.files import parsed, read_file, write_file
from freeze_core.scoring.kept import Kept
from freeze_core.scoring.question import Question, differing

__all__ = ["Checkpoint"]

FORMAT = "circuitfreeze-sweep-1"

SECONDS = 5.0
"""Between two writes of a sweep that goes on."""

INSTEAD = "give the path of a checkpoint of this sweep, or of no file yet"


class Checkpoint:
    """A file of tensors and facts, written whole or not at all.

    Args:
        path: the file; it need not be there yet.

    Raises:
        InterventionError: something that no file can be at.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        if not isinstance(path, str | PathLike):
            raise InterventionError(f"checkpoint={shown(path)}: must be None or the path of a file")
        self.path = Path(path)
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise InterventionError(f"checkpoint={shown(str(path))}: must be a file's path, in a folder that is there")
        self._written = time.monotonic()

    def load(self, question: Question, batches: int, interventions: int) -> Kept:
        """What is kept in the file, nothing if there is none.

        Raises:
            InterventionError: the file is none of a sweep, or of another one; says what is another.
        """
        kept = Kept.nothing(batches, interventions)
        if not self.path.exists():
            return kept
        found, facts = read_file(self.path, FORMAT, "checkpoint")
        try:
            asked = parsed(facts["question"])
        except (KeyError, ValueError) as error:
            raise self._refusal(f"does not say what it is of ({error!r})") from error
        if asked != question:
            raise self._refusal(f"of another sweep; what differs, there and here: {differing(asked, question)}")
        if _shapes(found) != _shapes(kept.tensors()):
            raise self._refusal(f"holds {_shapes(found)}, must be {_shapes(kept.tensors())}")
        return Kept(**found)

    def save_if_due(self, kept: Kept, question: Question) -> None:
        """Writes the file, if it was not written just now."""
        if time.monotonic() - self._written > SECONDS:
            self.save(kept, question)

    def save(self, kept: Kept, question: Question) -> None:
        """Writes the file.

        Raises:
            InterventionError: it cannot be written; the one before is still there.
        """
        try:
            write_file(self.path, FORMAT, kept.tensors(), {"question": json.dumps(question)})
        except OSError as error:
            raise self._refusal(f"cannot be written ({error})") from error
        self._written = time.monotonic()

    def _refusal(self, reason: str) -> InterventionError:
        return InterventionError(f"checkpoint of {self.path}: {reason}; {INSTEAD}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{one.dtype} {list(one.shape)}" for name, one in sorted(tensors.items())}
