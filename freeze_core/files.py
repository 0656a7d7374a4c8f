"""Files of tensors and facts: safetensors, so that no pickle is ever read, and written whole or not at all.

Behind the kind in the `format` of a file stands a digest of all that is in it, so that a file that was damaged is not
read as another one. Files of earlier versions have none, and are read without.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from freeze_core.errors import InterventionError

__all__ = ["Saved", "as_json", "check_values", "parsed", "read_file", "under", "write_file"]

DIGEST = " sha256:"
"""What stands between kind and digest in the format of a file."""


class Saved(ABC):
    """What a file can hold, as tensors and facts: safetensors, written whole or not at all."""

    file_format: ClassVar[str]
    """The kind of the file, with the version of its format."""

    file_title: ClassVar[str]
    """What a user calls it, for errors."""

    @abstractmethod
    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors, by name, and all else as text."""

    @classmethod
    @abstractmethod
    def _of_parts(cls, tensors: dict[str, Tensor], facts: dict[str, str]) -> Self:
        """What has these parts; raises `AttributeError`, `LookupError`, `TypeError` or `ValueError` for others."""

    def save(self, path: str | PathLike[str]) -> None:
        """Writes all of it to a safetensors file, whole or not at all.

        Raises:
            InterventionError: it was changed to something that is not allowed.
            OSError: the file cannot be written.
        """
        write_file(path, self.file_format, *self._parts())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Reads what `save` wrote; tensors are on the CPU.

        Raises:
            InterventionError: the file is missing, damaged, or holds something else.
        """
        tensors, facts = read_file(path, cls.file_format, cls.file_title)
        try:
            return cls._of_parts(tensors, facts)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InterventionError(f"{cls.file_title} of {path}: not what save writes ({error})") from error


def write_file(path: str | PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes `tensors` and `facts` to `path`, whose former content is there until all is written.

    Args:
        kind: what it is, with the version of its format.
    """
    apart = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    content = save(apart, {**facts, "format": f"{kind}{DIGEST}{_digest(apart, facts)}"})
    target = Path(path).resolve()  # what a link leads to, and not the link, is replaced
    part = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_file(path: str | PathLike[str], kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the facts that `write_file` wrote to `path`.

    Args:
        what: what a user calls it, for errors.

    Raises:
        InterventionError: it is not there, of no such kind, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise InterventionError(f"{what} of {path}: cannot be read as safetensors ({error})") from error
    found, _, digest = facts.get("format", "None").partition(DIGEST)
    if found != kind:
        raise InterventionError(f"{what} of {path}: format {facts.get('format')!r}, must be {kind!r}")
    if facts["format"] != kind and digest != _digest(tensors, facts):
        raise InterventionError(
            f"{what} of {path}: the file is damaged, or was changed by other software: its values are not those that "
            "were saved; restore a copy, or make and save it anew"
        )
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """A hash of names, dtypes, shapes and bits of all tensors, and of all facts but the format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    told = {name: fact for name, fact in facts.items() if name != "format"}
    digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def parsed(text: str) -> Any:
    """What a fact says that was written as JSON.

    Raises:
        ValueError: it is no JSON, or nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def as_json(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as the texts that `parsed` reads."""
    return {name: json.dumps(fact) for name, fact in facts.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, by the rest of their names."""
    return {rest: tensor for name, tensor in tensors.items() if (rest := name.removeprefix(f"{prefix}.")) != name}


def check_values(name: str, values: Tensor, *sizes: int | None, finite: bool = True) -> None:
    """Raises `ValueError` unless `values` are numbers in float64 of these sizes; `None` is any size from 1 on."""
    fits = values.dim() == len(sizes) and all(
        found == size if size is not None else found > 0 for found, size in zip(values.shape, sizes, strict=True)
    )
    if values.dtype != torch.float64 or not fits or (finite and not bool(values.isfinite().all())):
        shape = ", ".join("n" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{name} must be {'finite ' * finite}numbers [{shape}] in float64, and is {values.dtype} "
            f"{list(values.shape)}"
        )
