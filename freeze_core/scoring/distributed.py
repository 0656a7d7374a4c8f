"""The processes that share a sweep, and the messages that they exchange."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from freeze_core.errors import InterventionError, UnsupportedModelError, shown

__all__ = ["Processes", "refuse_sharded"]

_T = TypeVar("_T")

CPU = torch.device("cpu")

SYNCHRONISED = ("DistributedDataParallel", "FullyShardedDataParallel")
"""Modules whose forward waits for that of the other processes."""


class Processes:
    """The processes of a group, each of which does its share; or this one alone.

    Messages are JSON in tensors: nothing that is received can run.

    Args:
        distributed: `True` for all processes, a process group for those of it, `False` for this process alone.
        device: where the tensors lie that a group without gloo exchanges.

    Raises:
        InterventionError: `distributed` is something else, or there are no processes.
    """

    def __init__(self, distributed: object, device: torch.device = CPU) -> None:
        self._group: Any = None
        self.rank, self.size = 0, 1
        self._closed = distributed is False  # nobody is there to be told of a failure
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
    def ranks(self) -> list[int]:
        """The global ranks of these processes."""
        return list(dist.get_process_group_ranks(self._group)) if self._group else []

    def share(self, tasks: Sequence[_T], turn: int) -> Sequence[_T]:
        """This process's part of `tasks`: consecutive ones, as many as the others have, to one.

        Consecutive tasks cost much the same, being of one layer or of a few next to each other. The longer parts go to
        another process each `turn`.
        """
        place = (self.rank + turn) % self.size
        return tasks[len(tasks) * place // self.size : len(tasks) * (place + 1) // self.size]

    def exchange(
        self, message: Mapping[str, Any], receive: Callable[[list[Any]], object] = lambda messages: None
    ) -> list[Any]:
        """Sends a JSON object to all processes, and returns what each of them sent, in the order of their ranks.

        Args:
            receive: is called with these messages also where a process failed.

        Raises:
            InterventionError: another process failed, or is gone.
        """
        messages = self._gather_messages(message) if self.size > 1 else [message]
        receive(messages)
        failed = [f"process {rank}: {one['failed']}" for rank, one in enumerate(messages) if "failed" in one]
        if failed:
            self._closed = True
            if "failed" not in message:
                raise InterventionError(f"distributed: the sweep was given up, {'; '.join(failed)}")
        return messages

    def report_failure(
        self,
        error: BaseException,
        message: Mapping[str, Any] | None = None,
        receive: Callable[[list[Any]], object] = lambda messages: None,
    ) -> None:
        """Tells the others, once, that this process goes no further, and why; with a last `message`."""
        if not self._closed:
            self.exchange({"failed": f"{type(error).__name__}: {error}"[:2000], **(message or {})}, receive)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """An error in the context is raised in the other processes, too, which would wait for this one otherwise."""
        try:
            yield
            if not self._closed:
                self.exchange({})
        except BaseException as error:
            self.report_failure(error)
            raise

    def _gather_messages(self, message: Mapping[str, Any]) -> list[Any]:
        try:
            own = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
            lengths = [int(one) for one in self._gather(torch.tensor([len(own)]))]
            padded = torch.cat([own, own.new_zeros(max(lengths) - len(own))])
            texts = [one[:length] for one, length in zip(self._gather(padded), lengths, strict=True)]
        except BaseException as error:
            self._closed = True  # what the others received of it is unknown
            if isinstance(error, RuntimeError):
                raise InterventionError(
                    f"distributed: process {self.rank} cannot reach the others ({error}): see what ended one of them"
                ) from error
            raise
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def _gather(self, own: Tensor) -> list[Tensor]:
        sent = own.to(self._device)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self._group)
        return [one.cpu() for one in received]


def refuse_sharded(model: nn.Module, processes: Processes, checkpoint: bool) -> None:
    """Raises `UnsupportedModelError` where processes that must run each pass together would run different ones."""
    meshes = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]
    shared = [mesh for mesh in meshes if mesh is not None and mesh.size() > 1]
    ranks = sorted({rank for mesh in shared for rank in mesh.mesh.flatten().tolist()})
    wrapped = [type(module).__name__ for module in model.modules() if type(module).__name__ in SYNCHRONISED]
    if processes.size > 1 and (wrapped or len(set(ranks) & set(processes.ranks)) > 1):
        what = f"a {wrapped[0]}" if wrapped else f"spread over the processes {ranks}"
        raise UnsupportedModelError(
            f"distributed: the model is {what}, which run each pass together and cannot share the passes out: leave "
            "distributed=False and call score_heads in each of them, or give a copy of the model to each process"
        )
    if checkpoint and ranks:
        raise UnsupportedModelError(
            f"checkpoint: the model is spread over the processes {ranks}, which cannot tell what each of them had "
            "done: leave checkpoint=None"
        )
