"""What a frozen encoder gives to its decoder: outputs and caches from before the freeze are noticed.

An encoder-decoder runs its encoder once and then decodes from what it gave, `encoder_outputs`, or from the keys and
values of cross-attention that it cached. Either may be older than a freeze of the encoder, which then has no effect.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from freeze_core.errors import FreezeNotInForceError, InterventionError, StaleCacheWarning
from freeze_core.forward_patch import PassPatch
from freeze_core.freezing.pass_arguments import ForwardArguments, find_cache, returned_cache

__all__ = ["EncoderDecoderPatch"]

ATTRIBUTE = "_circuitfreeze_encoder_mark"
"""The attribute of a cache that says under which freezes of the encoder its cross-attention was filled."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EncoderDecoderPatch(PassPatch):
    """Stands in for the forward of the module that takes `encoder_outputs`, while its encoder is frozen.

    Args:
        module: the encoder-decoder.
        encoder: the module that computes its `encoder_outputs`.
    """

    def __init__(self, module: nn.Module, encoder: nn.Module) -> None:
        super().__init__(module)
        self._arguments = ForwardArguments(module, self.original)
        self._encoder = encoder
        self._hook: Any = None
        self._mark = self._on_stale = ""
        self._computed: set[int] = set()
        """Checksums of the rows that the encoder gave under the freezes that are live."""

    def attach(self) -> None:
        super().attach()
        self._hook = self._encoder.register_forward_hook(self._remember)

    def detach(self) -> None:
        super().detach()
        if self._hook is not None:
            self._hook.remove()

    def set_mark(self, mark: str, on_stale: str) -> None:
        """Notes under which freezes the encoder runs from now on: what it gave under others does not count."""
        if mark != self._mark:
            self._computed.clear()
        self._mark, self._on_stale = mark, on_stale

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        named = self._arguments.bind(args, kwargs)
        self._check_outputs(named.get("encoder_outputs"))
        cache = find_cache(named, type(self.module).__name__)
        if any(getattr(cache, "is_updated", {}).values()) and getattr(cache, ATTRIBUTE, "") != self._mark:
            self._report_stale_cache()
            return self.original(*args, **kwargs)
        output = self.original(*args, **kwargs)
        cache = returned_cache(output) if cache is None else cache
        if cache is not None:
            setattr(cache, ATTRIBUTE, self._mark)
        return output

    def _remember(self, encoder: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._computed.update(_checksums(_states(output)))

    def _check_outputs(self, given: Any) -> None:
        if given is not None and not self._computed.issuperset(_checksums(_states(given))):
            raise FreezeNotInForceError(
                f"encoder_outputs given to {type(self.module).__name__} were not computed under the freeze of its "
                "encoder, which has no effect on them: compute them while the freeze is live "
                "(model.get_encoder()(...)), or pass the encoder's inputs"
            )

    def _report_stale_cache(self) -> None:
        message = (
            f"the cache given to {type(self.module).__name__} holds keys and values of an encoder that was not frozen "
            "as it is now: fill it anew under this freeze (recompute_cache)"
        )
        if self._on_stale == "error":
            raise InterventionError(message)
        if self._on_stale == "warn":
            warnings.warn(message, StaleCacheWarning, stacklevel=2)


def _states(output: Any) -> Tensor:
    """The encoder's last hidden states `[batch, token, hidden]`, of what it returned or of what was made of that."""
    states = output if isinstance(output, Tensor) else output[0]
    if not isinstance(states, Tensor):
        raise InterventionError(
            f"encoder_outputs begins with a {type(states).__name__}: the encoder's last hidden states were expected "
            "there, so whether they are frozen is unknown; pass the encoder's inputs"
        )
    return states


def _checksums(states: Tensor) -> list[int]:
    """A checksum of the bits of each row: generation repeats and reorders rows, and changes none of them."""
    rows = states.detach().flatten(1).contiguous()
    bits = rows.view(BITS[rows.element_size()]).long()
    weights = torch.arange(bits.shape[1], device=bits.device) * 2 + 1  # odd, so that no bit is lost modulo 2 ** 64
    checksums: list[int] = (bits * weights).sum(1).tolist()
    return checksums
