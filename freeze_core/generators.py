"""The states of the generators that a pass may draw from, so that passes draw alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Generators"]


class Generators:
    """Torch's generators, of the CPU and of the CUDA devices that hold the model: of all, where some is offloaded."""

    def __init__(self, model: nn.Module) -> None:
        held = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        if any(parameter.is_meta for parameter in model.parameters()):  # loaded where it runs
            held = {torch.device("cuda", number) for number in range(torch.cuda.device_count())}
        self._devices = sorted(held, key=str)

    def states(self) -> list[Tensor]:
        """Copies of their states."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def put(self, states: list[Tensor]) -> None:
        """Puts them in `states`."""
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts them back at the end to the states that they have now."""
        before = self.states()
        try:
            yield
        finally:
            self.put(before)

    def drew(self, before: list[Tensor]) -> bool:
        """Whether anything was drawn since `before`."""
        return not all(torch.equal(one, other) for one, other in zip(before, self.states(), strict=True))

    def drawn(self, before: list[Tensor]) -> float:
        """What was drawn since `before`, as a number: 0 if nothing was, else a hash of `before`, a whole number."""
        if not self.drew(before):
            return 0.0
        digest = hashlib.sha256(b"".join(state.cpu().numpy().tobytes() for state in before))
        return float(int.from_bytes(digest.digest()[:6], "big") + 1)
