"""The processes that share a sweep, and what they tell each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from freeze_core.errors import InterventionError, UnsupportedModelError, shown

__all__ = ["Processes", "refuse_spread", "spread_over"]

_T = TypeVar("_T")

CPU = torch.device("cpu")

TOGETHER = ("DistributedDataParallel", "FullyShardedDataParallel")
"""Modules whose forward waits for that of the other processes."""


class Processes:
    """The processes of a group, each of which does its share; or this one alone.

    What they tell each other is JSON in tensors: nothing that is read can run.

    Args:
        distributed: `True` for all processes, a process group for those of it, `False` for this process alone.
        device: where the tensors lie that a group without gloo exchanges.

    Raises:
        InterventionError: `distributed` is something else, or there are no processes.
    """

    def __init__(self, distributed: object, device: torch.device = CPU) -> None:
        self._group: Any = None
        self.rank, self.size = 0, 1
        self._over = distributed is False  # nobody listens
        if distributed is False:
            return
        available = dist.is_available()  # not so in every build of torch
        if distributed is not True and not (available and isinstance(distributed, dist.ProcessGroup)):
            raise InterventionError(f"distributed={shown(distributed)}: must be True, False or a process group")
        if not available or not dist.is_initialized():
            raise InterventionError(
                "distributed=True: there is no process group; start the script by torchrun or accelerate launch and "
                "call torch.distributed.init_process_group() first"
            )
        self._group = dist.group.WORLD if distributed is True else distributed
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._device = CPU if "gloo" in dist.get_backend_config(self._group) else device

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def ranks(self) -> list[int]:
        """Which of all processes these are."""
        return list(dist.get_process_group_ranks(self._group)) if self._group else []

    def share(self, left: Sequence[_T], turn: int) -> Sequence[_T]:
        """This process's part of what is left: a stretch as long as the others', to one.

        What is left being of one layer, or of a few next to each other, the shares cost much the same; `turn` has the
        longer ones go round.
        """
        place = (self.rank + turn) % self.size
        return left[len(left) * place // self.size : len(left) * (place + 1) // self.size]

    def exchange(self, said: Mapping[str, Any]) -> list[Any]:
        """What each process says at the same time, JSON that is an object, in the order of their ranks.

        The caller goes on with `raise_failures`, when it has kept what the others did.

        Raises:
            InterventionError: another process is gone.
        """
        if not self.several:
            return [said]
        try:
            own = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
            lengths = [int(one) for one in self._gather(torch.tensor([len(own)]))]
            padded = torch.cat([own, own.new_zeros(max(lengths) - len(own))])
            texts = [one[:length] for one, length in zip(self._gather(padded), lengths, strict=True)]
        except BaseException as error:
            self._over = True  # what the others got of it is not known
            if isinstance(error, RuntimeError):
                raise InterventionError(
                    f"distributed: process {self.rank} cannot reach the others ({error}): see what ended one of them"
                ) from error
            raise
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def raise_failures(self, heard: Sequence[Mapping[str, Any]]) -> None:
        """Raises `InterventionError` if one of the processes says that it failed, in each of the others."""
        failed = [f"process {rank}: {said['failed']}" for rank, said in enumerate(heard) if "failed" in said]
        if failed:
            self._over = True
            raise InterventionError(f"distributed: the sweep was given up, {'; '.join(failed)}")

    def fail(self, error: BaseException, **more: Any) -> list[Any]:
        """Tells the others, once, that this process goes no further, and why; what they say to that."""
        if self._over:
            return []
        heard = self.exchange({"failed": f"{type(error).__name__}: {error}"[:2000], **more})
        self._over = True
        return heard

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised within is told to the others, which wait for this process otherwise; and raised in them."""
        try:
            yield
            if not self._over:
                self.raise_failures(self.exchange({}))
        except BaseException as error:
            self.fail(error)
            raise

    def _gather(self, own: Tensor) -> list[Tensor]:
        given = own.to(self._device)
        found = [torch.empty_like(given) for _ in range(self.size)]
        dist.all_gather(found, given, group=self._group)
        return [one.cpu() for one in found]


def spread_over(model: nn.Module) -> set[int]:
    """The processes that a model's parameters are spread over, this one among them; none if they are all here."""
    meshes = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]
    return {rank for mesh in meshes if mesh is not None and mesh.size() > 1 for rank in mesh.mesh.flatten().tolist()}


def refuse_spread(model: nn.Module, processes: Processes, checkpoint: bool) -> None:
    """Raises `UnsupportedModelError` where processes that must run each pass together would run different ones."""
    together = sorted(spread_over(model))
    wrapped = [type(module).__name__ for module in model.modules() if type(module).__name__ in TOGETHER]
    if processes.several and (wrapped or len(set(together) & set(processes.ranks)) > 1):
        what = f"a {wrapped[0]}" if wrapped else f"spread over the processes {together}"
        raise UnsupportedModelError(
            f"distributed: the model is {what}, which run each pass together and cannot share the passes out: leave "
            "distributed=False and call score_heads in each of them, or give a copy of the model to each process"
        )
    if checkpoint and together:
        raise UnsupportedModelError(
            f"checkpoint: the model is spread over the processes {together}, which cannot tell what each of them had "
            "done: leave checkpoint=None"
        )
