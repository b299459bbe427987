"""Processes of one torch.distributed group on this machine, which stay and run what a test gives them.

    with processes(4, tmp_path) as group:
        results = group.run(function, argument)  # one result for each rank

The function is named by its module, so it stands at the top of a test file. It may call torch.distributed.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SECONDS = 60
"""What a task may take, and what a collective waits for the other processes."""


class Processes:
    """The processes of a group, from rank 0 on."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls the function in every process and returns what each gave back, in the order of the ranks.

        Raises AssertionError with the traceback of the first process that failed, or did not answer in time.
        """
        task = pickle.dumps(
            (function, arguments)
        )  # whole, where Connection.send would share the memory of tensors
        for pipe in self.pipes:
            pipe.send_bytes(task)
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(2 * SECONDS), f"rank {rank} does not answer"
            result, failure = pickle.loads(pipe.recv_bytes())
            assert not failure, f"rank {rank}: {failure}"
            results.append(result)
        return results


@contextmanager
def processes(world: int, folder: Path) -> Iterator[Processes]:
    """A group of so many processes on the loopback interface, ended with the block. folder: for the file to meet at."""
    context = multiprocessing.get_context("forkserver")  # what is imported once is there in all of them
    context.set_forkserver_preload(["threetowers.model", "torch.distributed"])
    ends = [context.Pipe() for _ in range(world)]
    started = [
        context.Process(target=_serve, args=(rank, world, folder / f"group-{world}", end), daemon=True)
        for rank, (_, end) in enumerate(ends)
    ]
    for process, (_, theirs) in zip(started, ends, strict=True):
        process.start()
        theirs.close()  # so that the end of a process is the end of its pipe
    try:
        yield Processes([own for own, _ in ends])
        for own, _ in ends:
            own.send_bytes(pickle.dumps(None))
        for process in started:
            process.join(SECONDS)
    finally:
        for process in started:
            process.kill()
            process.join()


def _serve(rank: int, world: int, meeting: Path, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments = task
        try:
            answer = function(*arguments), ""
        except Exception:  # told to the test, which fails with it
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """The collectives of a block, by name, and the bytes that this process gives to each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            given = args[0] if name in ("allreduce_", "broadcast_") else args[1]  # after what is written to
            leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            self.seen.append((name, sum(leaf.numel() * leaf.element_size() for leaf in leaves)))
        return func(*args, **(kwargs or {}))
