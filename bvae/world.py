"""The processes that train one run together: those that torchrun started, or this one alone.

The only module of the trainer that knows torch.distributed. A process alone has a world of size 1, without a process
group, in which every method returns at once.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.errors import UserError
from bvae.machine import pick_device

TIMEOUT = timedelta(minutes=10)  # longest wait of a rank for another, which may be writing, drawing or compiling


class Lost(UserError):
    """Another process of the job has ended, or has been silent for TIMEOUT."""


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Turns the failure of a collective operation in the block into Lost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # raised by gloo, NCCL or the store
        reason = re.sub(r"^\[\S+\] ", "", (str(error) or type(error).__name__).splitlines()[0]).split(". ")[0]
        rank = f"rank {os.environ.get('RANK', 0)}"
        raise Lost(f"{rank} has lost the other processes: one has ended or hangs ({reason})") from error


class World:
    """This process's place among those of its job; use `World.join()` as a context manager.

    Attributes:
        rank: from 0; rank 0 alone writes files.
        size: number of processes.
        device: of this process; chosen by `connect`.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None, attempt: str = "") -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("cpu")
        self._said = 0
        self._job = store  # lives as long as the job, across torchrun's restarts, where torchrun keeps it
        self._store = dist.PrefixStore(attempt, store) if store is not None else None

    @classmethod
    def join(cls) -> Self:
        """The world that the environment describes, as torchrun sets it. Raises UserError where it cannot be joined."""
        given = os.environ.get("WORLD_SIZE", "1")
        if given == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        if not dist.is_available():
            raise UserError("this torch was built without torch.distributed: it trains on one device only")
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"WORLD_SIZE is {given}, but that job cannot be joined: use torchrun ({error})") from error
        # torchrun keeps one store over its restarts, in which a dead process's addresses must not be found again.
        return cls(rank, size, store, f"bvae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{size}")

    @property
    def first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def connect(self, device: str) -> Self:
        """Chooses this process's device (auto, cpu or cuda: one GPU a process) and meets the others.

        Raises UserError where there is no such device, or fewer GPUs than processes on this machine.
        """
        self.device = pick_device(device)
        if self.size == 1:
            return self
        if self.device.type == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
            if local >= there:
                raise UserError(f"more processes than CUDA devices on this machine ({there}): lower --nproc-per-node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        with talking():
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=TIMEOUT,
                # Connects now: a CUDA graph cannot be captured around the first use of a communicator.
                device_id=self.device if self.device.type == "cuda" else None,
            )
        return self

    # ---- tensors, on `device` -----------------------------------------------------------------------------------

    def sum_(self, t: Tensor) -> Tensor:
        """Replaces `t` by its sum over the ranks: the same bits on all of them. Returns it."""
        if self.size > 1:
            with talking():
                dist.all_reduce(t)
        return t

    def mean_(self, t: Tensor) -> Tensor:
        """Replaces `t` by its mean over the ranks: the same bits on all of them. Returns it."""
        return self.sum_(t).div_(self.size) if self.size > 1 else t

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the ranks of float32 tensors, in one all-reduce.

        The results have the shapes and strides of the tensors, which must be dense, and share one buffer.
        """
        flat = self.mean_(torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors]))
        parts = flat.split([t.numel() for t in tensors])
        return [
            part.as_strided(t.shape, t.stride(), part.storage_offset()) for part, t in zip(parts, tensors, strict=True)
        ]

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over the ranks, on the host: waits for the device."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.int64, device=self.device)
        with talking():
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
            return t.tolist()

    def share(self, count: int) -> slice:
        """This rank's part of `count` things: contiguous, and the parts of all ranks make up the whole."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    # ---- words --------------------------------------------------------------------------------------------------

    def from_first(self, text: str) -> str:
        """The text that rank 0 gives, on every rank."""
        if self._store is None:
            return text
        self._said += 1
        with talking():
            if self.first:
                self._store.set(f"said/{self._said}", text)
            return self._store.get(f"said/{self._said}").decode()

    def remember(self, text: str) -> None:
        """Keeps a text for `remembered`, in this job after torchrun restarted it."""
        if self._job is not None:
            self._job.set("bvae/remembered", text)

    def remembered(self) -> str | None:
        """The text that an earlier attempt of this job gave to `remember`.

        None in the job's first attempt, and without torchrun.
        """
        if self._job is not None and self._job.check(["bvae/remembered"]):
            return self._job.get("bvae/remembered").decode()
        return None

    def _speaks(self) -> bool:
        """True if this process is the first of the job to report why the job ends."""
        if self._store is None:
            return True
        try:
            return self._store.add("reports", 1) == 1
        except RuntimeError:  # who kept the store is gone, and can have claimed nothing
            return True

    # ---- coming and going ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits for the device where there are several ranks; Lost after TIMEOUT.

        A collective in a replayed CUDA graph waits for a rank that hangs for ever, and so would the host.
        """
        if self.size == 1 or self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while not event.query():
            if time.monotonic() > deadline:
                raise Lost(f"rank {self.rank} waits for the other processes: one hangs ({TIMEOUT} without a step)")
            time.sleep(1e-4)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.largest(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the connection. Only one of the ranks that end with a UserError lets it through, to print it once."""
        speaks = error is None or self._speaks()
        if self.size > 1 and dist.is_initialized():
            assert dist.group.WORLD is not None
            if error is None:
                self.wait()  # NCCL may hang where a rank leaves while another still works
                dist.destroy_process_group()
            else:
                with contextlib.suppress(RuntimeError):
                    dist.group.WORLD.abort()  # operations that still wait for another rank must not delay the end
        if isinstance(error, UserError) and not speaks:
            raise SystemExit(2)


ALONE = World()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        gathered = t.new_zeros(dist.get_world_size(), *t.shape)
        gathered[dist.get_rank()] = t
        with talking():
            dist.all_reduce(gathered)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        with talking():
            dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather(t: Tensor) -> Tensor:
    """`t` of every rank of the connected world, [size, ...]; differentiable, across the ranks."""
    return _Gather.apply(t)
