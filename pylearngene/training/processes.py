# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one network: who they are, what they tell each other, and how they end together.

They are those of an initialised `torch.distributed` group, or those that torchrun or `accelerate launch` started. A
process on its own sets nothing up and computes what it always did. Sharded parameters (FSDP) are not here.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pylearngene import errors
from pylearngene.errors import ArgumentError, ProcessError, PylearngeneError
from pylearngene.training import _joining

T = TypeVar("T")
FAREWELL_SECONDS = 3.0
INTERRUPTED = 130


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen by one of them; every method but the properties is called by all of them.

    Attributes:
        rank: number of this process, from 0.
        world: how many there are.
        local_rank: its number on this machine, which is that of its GPU.
        group: for messages and CPU tensors; None is the default group.
        store: what a failing process leaves word in; None where the caller formed the group.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None
    store: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process where all were asked for one: its own GPU for "cuda".

        Raises:
            ArgumentError: a GPU is named by number, or there are fewer than processes.
        """
        if self.world == 1 or device.type != "cuda":
            return device
        if device != torch.device("cuda") or self.local_rank >= torch.cuda.device_count():
            have = f"{torch.cuda.device_count()} GPUs"
            raise ArgumentError(f"device: expected cpu, or cuda with a GPU per process, got {device} and {have}")
        return torch.device("cuda", self.local_rank)

    def share(self, index: Tensor) -> tuple[Tensor, float]:
        """Return this process's part of a batch and its weight, the share of the batch that it is.

        A batch smaller than the number of processes leaves some with nothing; one sample then stands in, of weight 0,
        since all of them must take part in the backward pass.
        """
        if self.world == 1:
            return index, 1.0
        part = index.tensor_split(self.world)[self.rank]
        return (part, len(part) / len(index)) if len(part) else (index[:1], 0.0)

    def scaled(self, loss: Tensor, weight: float) -> Tensor:
        """Scale the mean loss of a part so that the average of all gradients is that of the batch's mean loss."""
        return loss if self.world == 1 else loss * (weight * self.world)

    def mean(self, values: Sequence[float], weight: float) -> list[float]:
        """Return the means of a batch from the means of this process's part."""
        return list(values) if self.world == 1 else self.sum([value * weight for value in values])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.world == 1:
            return list(values)
        return [float(value) for value in self.add(torch.tensor(values, dtype=torch.float64))]

    def add(self, tensor: Tensor) -> Tensor:
        """Add up a CPU tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the CPU tensors of all processes, in order; they have one shape."""
        if self.world == 1:
            return [tensor]
        found = [torch.zeros_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor, group=self.group)
        return found

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what to call in place of the model: its backward pass averages gradients over the processes.

        A gene used by many layers has one gradient and needs nothing special. Buffers are those of the main process.
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        wrapped = DistributedDataParallel(model, process_group=self.group if device.type == "cpu" else None)
        _wrapped.add(wrapped)
        return wrapped

    def check_gradients(self, model: nn.Module) -> None:
        """Refuse trainable parameters that the backward pass did not reach: the others would wait for them.

        Raises:
            ArgumentError: there are some; the message names the first.
        """
        if self.world == 1:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise ArgumentError(
                    f"model: expected every trainable parameter to take part in the loss when {self.world} processes "
                    f"train, got no gradient of {name}; freeze it with requires_grad_(False)"
                )

    def on_main(self, act: Callable[[], T]) -> T:
        """Let the main process act; all return its result (as JSON holds it) or raise its error."""
        if self.world == 1:
            return act()
        result, error = None, None
        if self.main:
            try:
                result = act()
            except PylearngeneError as caught:
                error = caught
        told = self._tell({"result": result, "error": None if error is None else [type(error).__name__, str(error)]})
        if error is not None:
            raise error
        if told["error"] is not None:
            name, text = told["error"]
            raise getattr(errors, name, PylearngeneError)(text)
        return cast(T, result if self.main else told["result"])

    def main_first(self, act: Callable[[], T]) -> T:
        """Let the main process act, then the others: what the first had to fetch is there for them."""
        results: list[T] = []
        self.on_main(lambda: results.append(act()))
        return results[0] if results else act()

    @contextmanager
    def within(self, context: Callable[[], AbstractContextManager[T]]) -> Iterator[T | None]:
        """Enter a context on the main process alone; the others get None, and its errors on entering and leaving."""
        with ExitStack() as stack:
            entered: list[T] = []
            self.on_main(lambda: entered.append(stack.enter_context(context())))
            yield entered[0] if entered else None
            self.sum([0.0])  # all have come this far: none has failed
            self.on_main(stack.close)

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """End the run of all processes when one fails in the block.

        The library's own errors are raised alike by all of them and pass.

        Raises:
            ProcessError: another process failed or does not answer.
        """
        try:
            yield
        except PylearngeneError:
            raise
        except BaseException as error:
            reason = self.failed(error)
            if reason is error:
                raise
            raise reason from error
        finally:
            _unwrap()

    def failed(self, error: BaseException) -> BaseException:
        """Leave word why this process fails and close the group, so that none waits for it; returns the true reason."""
        if self.store is None:
            return error
        text = " ".join(str(error).split()) or "interrupted"
        first, mine = None, json.dumps({"rank": self.rank, "code": exit_code(error), "text": text})
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        with contextlib.suppress(Exception):  # the store may be gone with the process that kept it
            if not lost:
                self.store.compare_set("failure", "", mine)
            if self.store.check(["failure"]):
                first = json.loads(self.store.get("failure"))
        _close()
        own = not lost and (first is None or first["rank"] == self.rank)
        stopped = isinstance(error, KeyboardInterrupt) and (first is None or first["code"] == INTERRUPTED)
        if isinstance(error, PylearngeneError) or own or stopped:
            return error
        if first is None:
            return ProcessError("processes: another one ended, or did not answer in time")
        reason = ProcessError(f"processes: {first['rank']} of {self.world} failed: {first['text']}")
        reason.exit_code = first["code"]
        return reason

    def first_to_say(self, text: str) -> bool:
        """Tell whether no other process has said this, so that a message common to all is printed once."""
        if self.store is None:
            return self.main or self.world == 1
        with contextlib.suppress(Exception):
            return bool(self.store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
        return True

    def leave(self) -> None:
        """Wait a moment for the others to fail too: a launcher ends all processes once one has ended."""
        if self.store is None:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + FAREWELL_SECONDS
        with contextlib.suppress(Exception):
            self.store.add("left", 1)
            while self.store.add("left", 0) < self.world and time.monotonic() < end:
                time.sleep(0.02)

    def _tell(self, value: Any) -> Any:
        """Return the main process's value in every process."""
        data = json.dumps(value).encode() if self.main else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self.group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.main:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self.group)
        return json.loads(buffer.numpy().tobytes())


ALONE = Processes()
_joined: Processes | None = None
_of: int | None = None  # identity of the torch.distributed group that _joined speaks of
_wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def exit_code(error: BaseException) -> int:
    """Return the exit code of the command line for an exception."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, PylearngeneError) else 1


def current() -> Processes:
    """Return the processes of this run as far as they have joined; a process on its own before that."""
    return ALONE if _joined is None else _joined


def join() -> Processes:
    """Return the processes of this run, forming their group at the first call; all of them call it.

    Returns:
        Those of an initialised `torch.distributed` group; else those of a launcher's environment (RANK, WORLD_SIZE,
        MASTER_ADDR, MASTER_PORT), by gloo, and nccl for CUDA tensors; else this process on its own.

    Raises:
        ArgumentError: the environment is not what a launcher sets.
        ProcessError: the others did not come, or a failure has closed the group.

    Example:
        >>> join().world
        1
    """
    global _joined, _of
    if not (dist.is_available() and dist.is_initialized()):
        if _joined is not None and _joined.store is not None:
            raise ProcessError("processes: their group was closed by a failure; start all of them again")
        if _joining.launched() == 1:
            return ALONE
        store = _joining.form_group()
        # Left to the interpreter's end, torch's threads are now and then destroyed while they run: the process aborts.
        atexit.register(_close)
        local = _joining.number("LOCAL_RANK", 0)
        _joined, _of = Processes(dist.get_rank(), dist.get_world_size(), local, None, store), id(dist.group.WORLD)
    elif _joined is None or _of != id(dist.group.WORLD):
        _joined, _of = _of_the_caller(), id(dist.group.WORLD)
    return _joined


def _of_the_caller() -> Processes:
    """The processes of a group that the caller formed."""
    if dist.get_world_size() == 1:
        return ALONE
    group = None if "gloo" in str(dist.get_backend()) else dist.new_group(backend="gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), _joining.number("LOCAL_RANK", 0), group)


def _unwrap() -> None:
    """Let go of the group in wrapped models: torch can hang when one of them is the last to hold a destroyed group."""
    for model in list(_wrapped):
        for name in ("reducer", "logger", "process_group"):
            setattr(model, name, None)
    _wrapped.clear()


def _close() -> None:
    """Close the connections, which the others notice at once; they stay open while anything refers to the group."""
    _unwrap()
    with contextlib.suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()
