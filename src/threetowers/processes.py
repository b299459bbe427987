"""The processes that train one model together, over torch.distributed; in one process nothing of this does anything.

    with joined(config.device) as processes:   # as torchrun's environment says
        processes.rank, processes.size
        processes.add(x)                       # the sum of the tensors x of all processes
        processes.exchange(3)                  # the values of all processes, by rank

Tensors go where they lie: between GPUs by NCCL, from host memory by gloo. Small values that decide what happens next
are exchanged in host memory, so that no process waits for its GPU.

Legend: W processes, B samples of each, G = W · B samples of all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from threetowers.errors import LostProcessError, UsageError
from threetowers.heartbeats import PLACE, told

PATIENCE = timedelta(days=7)
"""What a collective waits for the other processes. It is long, since they wait while rank 0 opens a data set, or while
one of them embeds for longer than the others; where a process dies, gloo says so at once, and the launcher ends the
others."""
BUCKET = 25_000_000
"""Numbers that are added up at once, about 100 MB of gradients."""
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and which this one is; of all, and of those on this machine.

    All processes call the methods in the same order. Raises LostProcessError where another one is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks for all."""
        return self.rank == 0

    def own(self, num: int) -> slice:
        """The places of this process's samples among `num`, as many as every other's where they can be."""
        return slice(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def add(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all processes, in place, the same to the bit in each."""
        if self.size > 1:
            with _all_there():
                dist.all_reduce(values)
        return values

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replaces the gradient of each parameter by the sum over all processes; one without a gradient is left out."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        while gradients:
            bucket = [gradients.pop(0)]
            while gradients and sum(map(Tensor.numel, bucket)) + gradients[0].numel() <= BUCKET:
                bucket.append(gradients.pop(0))
            total = self.add(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            for gradient, part in zip(bucket, total.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each [B, …] tensor of all processes, [G, …] in the order of the ranks, by one all_gather of bytes."""
        if self.size == 1 or not tensors:
            return list(tensors)
        num = len(tensors[0])
        parts = [tensor.detach().reshape(num, -1).contiguous().view(torch.uint8) for tensor in tensors]
        packed = torch.cat(parts, dim=1)
        gathered = packed.new_empty(self.size * num, packed.shape[1])
        with _all_there():
            _all_gather_single(gathered, packed)
        widths = [part.shape[1] for part in parts]
        return [
            # a copy, as products want rows one after the other and a dtype wants its own alignment
            part.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(-1, *tensor.shape[1:])
            for part, tensor in zip(gathered.split(widths, dim=1), tensors, strict=True)
        ]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The [n, D] rows of all processes in the order of the ranks, where each may have another number, or none."""
        if self.size == 1:
            return rows
        counts = self.exchange(len(rows))
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = self.gather([padded])[0].chunk(self.size)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def add_scattered(self, values: Tensor) -> Tensor:
        """Of [G, D] the sum over the processes of the B rows that belong to this one."""
        if self.size == 1:
            return values
        own = values.new_empty(len(values) // self.size, *values.shape[1:])
        with _all_there():
            _reduce_scatter_single(own, values)
        return own

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; each is anything that JSON can hold."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _all_there():
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = int(max(sizes))
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
            dist.all_gather(texts, torch.cat([data, data.new_zeros(longest - len(data))]))
        return [
            json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)
        ]

    def told(self, make: Callable[[], T]) -> T:
        """What rank 0 makes; the others wait for it. It is anything that JSON can hold."""
        value: T = self.exchange(make() if self.first else None)[0]
        return value

    @contextmanager
    def one_before_all(self) -> Iterator[None]:
        """A block that rank 0 leaves before the others enter it, for files that are made on first use."""
        if not self.first:
            self.exchange(None)
        yield
        if self.first:
            self.exchange(None)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A block whose OSError in one process is raised in all of them, once every process has left the block."""
        own: OSError | None = None
        try:
            yield
        except OSError as error:
            own = error
        told = None if own is None else [own.errno, own.strerror or str(own), str(own.filename or "")]
        for found in self.exchange(told):
            if found is not None:
                raise own or OSError(*found)

    def seed(self, *key: int) -> None:
        """Random numbers of torch that depend on the key and the rank; one process goes on with those that it has."""
        if self.size > 1:
            text = "/".join(map(str, (*key, self.rank)))
            torch.manual_seed(
                int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
            )


ALONE = Processes()


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun's environment names, connected while the block lasts; ALONE without one.

    device: of the training. On CUDA each process takes the device of its local rank. Raises UsageError where there are
    fewer devices than processes, or one is named.
    """
    processes = named_by_environment()
    if processes.size == 1:
        yield processes
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if ":" in device:
        raise UsageError(
            f"device: {device!r} is one device; with several processes give cuda, and each takes its own"
        )
    if cuda:
        if torch.cuda.device_count() < processes.local_size:
            raise UsageError(
                f"{processes.local_size} processes on this machine, and torch finds {torch.cuda.device_count()} CUDA "
                "devices; give as many processes as devices, or --device cpu"
            )
        torch.cuda.set_device(processes.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE, **_meeting())
    with told(dist.distributed_c10d._get_default_store(), processes.rank, processes.size):
        yield processes
    dist.destroy_process_group()  # not after an error, when another process may never answer


def _meeting() -> dict[str, Any]:
    """Where the processes meet, by the names of arguments.

    torchrun keeps its store when it starts the processes again, and a process that reads the address of one that has
    ended cannot connect. So each start has its own keys. Those of several machines do not count starts alike, and
    meet where torch says.
    """
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    own = dist.PrefixStore(f"start-{attempt}", store)  # type: ignore[attr-defined]
    return {"store": own, "rank": rank, "world_size": size}


def named_by_environment() -> Processes:
    """The place of this process in torchrun's environment; ALONE where torchrun has not started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE  # RANK and WORLD_SIZE alone may be those of something else
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Processes(*(int(os.environ[name]) for name in names))


def is_restart() -> bool:
    """Whether torchrun has started this process again after one of them had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def is_first_to_say(text: str) -> bool:
    """Whether no other process has failed before this one, so that the user should be told of it here.

    An error that all processes meet is said once, and the end of one process is not told by those that miss it.
    """
    if not dist.is_initialized():
        return named_by_environment().first
    processes = named_by_environment()
    try:
        store = dist.distributed_c10d._get_default_store()
        said: bytes = store.compare_set("threetowers/error", "", f"{processes.rank} {text}")
    except RuntimeError:
        return True  # the store is gone with the launcher
    return said.decode().partition(" ")[0] == str(processes.rank)


@contextmanager
def _all_there() -> Iterator[None]:
    """Around a collective: where others wait for this process, and LostProcessError when one of them is gone."""
    try:
        with PLACE.collective():
            yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)):
            raise
        raise LostProcessError(
            "another process of this run has ended; the same command continues from the last checkpoint"
        ) from error


# torch 2.14 has new names for both, and warns of the old ones
_new = hasattr(dist, "all_gather_single")
_all_gather_single = dist.all_gather_single if _new else dist.all_gather_into_tensor
_reduce_scatter_single = dist.reduce_scatter_single if _new else dist.reduce_scatter_tensor
