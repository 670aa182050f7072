"""The processes that train one run together: which of them this is, and what they tell each other.

A launcher (`apt train --nproc N`, torchrun) starts each one with the variables RANK, WORLD_SIZE, LOCAL_RANK and
MASTER_ADDR; without them a run is a single process, for which everything here does nothing. torch is imported on use.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from apt.core.errors import AptError, ConfigError, PeerLostError, in_a_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

PATIENCE = 3.0
"""Seconds in which a process that fails by itself says so, before the others conclude that it was killed."""

LONG = timedelta(days=1)
"""How long one process may take for what the others wait for: a large text is tokenized in hours."""

SILENCE = 60
"""Seconds after which a machine that does not answer is gone: its power, or the cable. The systems ask each other, also
where the processes have nothing to say."""

_runs = itertools.count()
"""Numbers the runs of this process: each process of a run has had as many."""

_LOST = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Timed out waiting", "Connection timed out",
    "No route to host", "is unreachable", "remote process exited",
)  # fmt: skip
"""What the transport says of a process that is gone."""

_TRANSPORTS = ("gloo", "NCCL")
"""One of these says it too: others, such as a tracker's client, have the same words for losses of their own."""


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds: of one that is sharded over the processes its own shard, else all of it."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: which one this is, from 0. Process 0 alone writes: to the console, to the run's folder, to trackers.
        size: how many there are.
        local_rank, local_size: likewise, on this machine.
        machine: which machine this is, from 0.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, *, local_rank: int = 0, local_size: int = 1, machine: int = 0
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self.machine = machine
        self._store: Any = None
        self._on_devices = False
        self._device: Any = None
        self._wires: set[int] = set()

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> World:
        """The world that a launcher has described.

        Raises:
            ConfigError: it has described half of one.
        """
        if variables.get("WORLD_SIZE", "1") == "1":
            return cls()
        missing = [name for name in VARIABLES if name not in variables]
        wrong = f"the environment lacks {', '.join(missing)}" if missing else ""
        try:
            rank, size, _ = (int(variables.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            local_rank, local_size, machine = (
                int(variables.get(name, default))
                for name, default in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size), ("GROUP_RANK", 0))
            )
            if not 0 <= rank < size:
                wrong = wrong or f"RANK is {rank}: it counts from 0 to WORLD_SIZE - 1"
        except ValueError:
            wrong = wrong or "RANK, WORLD_SIZE and MASTER_PORT are not all numbers"
        if wrong:
            raise ConfigError(
                f"WORLD_SIZE is {variables['WORLD_SIZE']}, and {wrong}",
                hint="start the processes with: apt train --nproc N, or torchrun; or unset WORLD_SIZE",
            )
        return cls(rank, size, local_rank=local_rank, local_size=local_size, machine=machine)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, the one that writes."""
        return self.rank == 0

    def meet(self) -> None:
        """Find the store that all processes read and write.

        Raises:
            PeerLostError: it is not there.
        """
        if self.size == 1:
            return
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        with self.watching():
            store, _, _ = next(rendezvous("env://", self.rank, self.size))
            # A name for each run: a launcher's store still holds what the processes told each other in the last one.
            self._store = PrefixStore(f"apt {next(_runs)}", store)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Inside this block the processes, which have met, can talk: over NCCL what lies on GPUs (over its own kind of
        transport what lies on another accelerator), over gloo everything else.

        Raises:
            PeerLostError: they do not find each other.
        """
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        self._on_devices, self._device = device.type != "cpu", device
        backend = "cpu:gloo"
        if self._on_devices:
            backend += f",{device.type}:{dist.get_default_backend_for_device(device)}"
        before = _sockets()
        with self.watching():
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)
        self.wait_for_all()
        connected = _sockets()
        self._wires = connected - before
        for descriptor in connected:
            _end_in_silence(descriptor)
        try:
            yield
        except BaseException:
            self.abandon()
            with suppress(RuntimeError):
                self._leave()
            raise
        self._leave()

    # What is computed together

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's `x`, the same on each; `x` itself where there is one process.

        A plugin that counts something over the tokens of a step counts its process's own, and sums here. Every process
        must come to this call, in the same order as to others.

        Raises:
            PeerLostError: another process is gone.
        """
        if self.size == 1:
            return x
        import torch.distributed as dist

        total = x.detach().clone()
        with self.watching():
            dist.all_reduce(total)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every process's `x`, in the same way."""
        return x if self.size == 1 else self.sum(x) / self.size

    def maximum(self, numbers: Sequence[int]) -> list[int]:
        """The highest of each of some numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        highest = torch.tensor(numbers)
        with self.watching():
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return [int(number) for number in highest]

    def gather(self, message: Any) -> list[Any]:
        """What every process says, in the order of their ranks: JSON-compatible values."""
        if self.size == 1:
            return [message]
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        with self.watching():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(data)]))
            longest = max(int(length) for length in lengths)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.nn.functional.pad(data, (0, longest - len(data))))
        pairs = zip(texts, lengths, strict=True)
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in pairs]

    def first_said(self, text: str) -> str:
        """The first text that is not empty, in the order of the processes' ranks."""
        return next(filter(None, self.gather(text)), "")

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        self.maximum([0])

    @contextmanager
    def one_first(self, what: str) -> Iterator[None]:
        """One process of each machine goes through this block; the others of the machine follow when it is through, and
        all go on together: one machine may take hours longer than another, and no transport waits for so long.

        Args:
            what: a name for the block; each is entered once.

        Raises:
            PeerLostError: another process has failed meanwhile.
        """
        if self.size == 1:
            yield
            return
        key = f"{what} {self.machine}"
        if self.local_rank:
            self._wait_for(key)
        try:
            yield
        finally:
            if not self.local_rank:
                with suppress(RuntimeError):
                    self._store.set(key, "")
        with self.watching():
            if self._store.add(f"{what} came", 1) == self.size:
                self._store.set(f"{what} all", "")
        self._wait_for(f"{what} all")

    def _wait_for(self, key: str) -> None:
        with self.watching():
            pause, expiry = 0.02, time.monotonic() + LONG.total_seconds()
            while not self._store.check([key]):
                if self._store.check(["failure"]) or time.monotonic() > expiry:
                    raise PeerLostError("another process of the run has failed")
                time.sleep(pause)
                pause = min(2 * pause, 1.0)

    # What is said without waiting for an answer

    def tell(self, what: str, message: Any) -> None:
        """Leave a message, a JSON-compatible value, where every process finds it; it replaces the last one."""
        with self.watching():
            self._store.set(what, json.dumps(message))

    def told(self, what: str) -> Any:
        """The message that was left; None if there is none yet. Any thread may ask."""
        with self.watching():
            return json.loads(self._store.get(what)) if self._store.check([what]) else None

    # When one of them fails

    def standings(self, own: Any, seconds: float) -> list[Any] | None:
        """What every process of a run that fails says of itself, in the order of their ranks; None where one of them
        has not come here in so many seconds. Whatever they compute together ends, so that they do."""
        if self.size == 1:
            return [own]
        with suppress(RuntimeError, PeerLostError):
            self.tell(f"standing {self.rank}", own)
            self._hang_up()
            expiry = time.monotonic() + seconds
            while time.monotonic() < expiry:
                said = [self.told(f"standing {rank}") for rank in range(self.size)]
                if None not in said:
                    return said
                time.sleep(0.05)
        return None

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """What ends in this block with an error is not to be ended once more: where one process has left, a launcher
        sends the others SIGTERM, and they may still have something to say."""
        try:
            yield
        except BaseException:
            if self.size > 1 and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What the loss of another process raises inside this block comes out as PeerLostError."""
        try:
            yield
        except RuntimeError as error:
            if (lost := self.loss_behind(error)) is None:
                raise
            raise lost from error

    def loss_behind(self, error: BaseException) -> PeerLostError | None:
        """The loss of another process that `error` tells of, if it does."""
        if self.size == 1 or not isinstance(error, RuntimeError) or not _is_loss(error):
            return None
        return PeerLostError(f"the other processes cannot be reached: {' '.join(str(error).split())}")

    def first_failure(self, error: BaseException) -> str | None:
        """Tell the others that this process fails, with what; returns what another one has said before, if `error` only
        follows from that."""
        if self._store is None:
            return None
        said = f"{type(error).__name__}: {error.message}" if isinstance(error, AptError) else in_a_line(error)
        text = f"process {self.rank}: {said}"
        with suppress(RuntimeError):
            if self.is_first:
                self._store.set("ending", "")
            if not isinstance(error, PeerLostError):
                said = self._store.compare_set("failure", "", text).decode()
                return None if said == text else str(said)
            expiry = time.monotonic() + PATIENCE
            while time.monotonic() < expiry:
                if self._store.check(["failure"]):
                    return str(self._store.get("failure").decode())
                time.sleep(0.05)
        return None

    def end_together(self) -> None:
        """Hold a process that failed until process 0 has saved what can be saved: where one has left, a launcher gives
        the others half a minute."""
        if self._store is None:
            return
        with suppress(RuntimeError):
            if self.is_first:
                self._store.set("ended", "")
            elif not self._on_devices:
                self._hang_up()
                self._store.wait(["ending"], timedelta(seconds=2 * PATIENCE))
                self._store.wait(["ended"], timedelta(minutes=10))

    def _hang_up(self) -> None:
        """Close the lines to the other processes, so that those which wait for this one wake up: gloo itself does that
        only when its process ends."""
        for wire in self._wires:
            with suppress(OSError), socket.socket(fileno=os.dup(wire)) as line:
                line.shutdown(socket.SHUT_RDWR)
        self._wires = set()

    def _leave(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def abandon(self) -> None:
        """End what the devices compute together: it may wait for a process that is gone, and would do so for ever."""
        import torch.distributed as dist

        if self._on_devices and dist.is_initialized():
            with suppress(RuntimeError):  # not every transport can
                dist.group.WORLD._get_backend(self._device).abort()  # type: ignore[union-attr]


def leave(code: int) -> NoReturn:
    """End this process, one of several, with an exit code.

    As at any end of Python pools of threads are closed, threads that are no daemons are waited for, and what is
    registered with `atexit` is called; but the interpreter is not taken down. A thread of gloo's that lets go of a
    tensor while that happens aborts the process, at the end of a run that went well (pytorch/pytorch#190489).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # the interpreter's own first step; it has no public name
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _sockets() -> set[int]:
    """The descriptors of this process's TCP connections."""
    import psutil

    try:
        return {connection.fd for connection in psutil.Process().net_connections("tcp") if connection.raddr}
    except psutil.Error:
        return set()


def _end_in_silence(descriptor: int) -> None:
    """Have the system close a TCP connection whose other side is silent. Where it cannot be told to, the limit of the
    transport holds: half an hour."""
    times = {"TCP_KEEPIDLE": SILENCE // 4, "TCP_KEEPINTVL": SILENCE // 4, "TCP_KEEPCNT": 3}
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {**times, "TCP_USER_TIMEOUT": 1000 * SILENCE}.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_loss(error: RuntimeError) -> bool:
    import torch.distributed as dist

    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    return any(name in text for name in _TRANSPORTS) and any(words in text for words in _LOST)
