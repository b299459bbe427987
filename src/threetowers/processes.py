"""The processes that train one model together, over torch.distributed; in one process nothing of this does anything.

    with joined() as processes:              # as torchrun's environment says
        processes.size, processes.rank
        processes.add(x)                     # the sum of the tensors x of all processes
        everyone = processes.exchange(3)     # the values of all processes, by rank

Tensors go where they lie: between GPUs by NCCL, from host memory by gloo. Small values that decide what happens next
are exchanged in host memory, so that no process waits for its GPU.

Legend: W processes, B samples of each, G = W · B samples of all.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=7)
"""What a collective waits for the other processes. It is long, since they may wait while rank 0 embeds a data set; the
launcher ends the job when a process dies."""


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and which this one is; of this machine, and of all.

    Every method is called by all processes in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def own(self, num: int) -> slice:
        """The places of this process's samples among `num`, a multiple of the number of processes."""
        return slice(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def add(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all processes, in place, the same to the bit in each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each [B, …] tensor of all processes, [G, …] in the order of the ranks, by one all_gather of bytes."""
        if self.size == 1 or not tensors:
            return list(tensors)
        num = len(tensors[0])
        parts = [tensor.detach().reshape(num, -1).contiguous().view(torch.uint8) for tensor in tensors]
        packed = torch.cat(parts, dim=1)
        gathered = packed.new_empty(self.size * num, packed.shape[1])
        _all_gather_single(gathered, packed)
        widths = [part.shape[1] for part in parts]
        return [
            # a copy, as products want rows one after the other and a dtype wants its own alignment
            part.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(-1, *tensor.shape[1:])
            for part, tensor in zip(gathered.split(widths, dim=1), tensors, strict=True)
        ]

    def add_scattered(self, values: Tensor) -> Tensor:
        """Of [G, D] the sum over the processes of the B rows that belong to this one."""
        if self.size == 1:
            return values
        own = values.new_empty(len(values) // self.size, *values.shape[1:])
        _reduce_scatter_single(own, values)
        return own

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; each is anything that JSON can hold."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, torch.cat([data, data.new_zeros(longest - len(data))]))
        return [
            json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)
        ]

    @contextmanager
    def one_before_all(self) -> Iterator[None]:
        """A block that rank 0 goes through before the others enter it, for what is made on first use and then found."""
        if not self.first:
            self.exchange(None)
        yield
        if self.first:
            self.exchange(None)


ALONE = Processes()


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun's environment names, connected while the block lasts; ALONE without one.

    device: of the training. On CUDA each process takes the device of its local rank.
    """
    processes = named_by_environment()
    if processes.size == 1:
        yield processes
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(processes.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def named_by_environment() -> Processes:
    """The place of this process, as torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE  # an environment of something else, such as a scheduler's own step
    return Processes(*(int(os.environ.get(name, default)) for name, default in names.items()))


# torch 2.14 has new names for both, and warns of the old ones
_new = hasattr(dist, "all_gather_single")
_all_gather_single = dist.all_gather_single if _new else dist.all_gather_into_tensor
_reduce_scatter_single = dist.reduce_scatter_single if _new else dist.reduce_scatter_tensor
