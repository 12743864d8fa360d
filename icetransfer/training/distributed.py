"""Several processes, one training: who is who, and what they agree on.

torchrun or Slurm's srun start the processes, on one node or several.  Each computes the gradients
of its share of a step's batch, and all step with their sum: losses are sums over utterances, so N
processes do what one would do with N times the batch.

The sums are taken here, and not by DistributedDataParallel.  That takes means; and it needs the
same number of backward passes in every process, while here a share may be empty, and one that does
not fit into the memory is tried again in pieces.
"""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icetransfer.stage.parent import end_with_parent

T = TypeVar("T")

PATIENCE = timedelta(days=7)
BUCKET = 1 << 23  # gradients summed at once, 32 MB in float32


@dataclass(frozen=True)
class World:
    """The processes of a training, seen from one of them.

    Attributes:
        rank: of this process.
        size: how many there are.
        local_rank: of this process on its node, which is the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_writer(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
        return numbers

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; computed on the hosts."""
        return here if self.size == 1 else bool(self.sum(torch.tensor(int(here))))

    def share(self, value: Any) -> Any:
        """The writer's value, in every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def as_writer(self, work: Callable[[], T]) -> T:
        """What the writer's work gives, in every process; all of them wait for it.

        Raises:
            OSError: in the other processes, when the work has failed in the writer's.
        """
        result, failure = None, None
        if self.is_writer:
            try:
                result = work()
            except Exception as error:
                self.share((None, f"{type(error).__name__}: {error}"))
                raise
        result, failure = self.share((result, failure))
        if failure is not None:
            raise OSError(f"the process that writes the files has failed ({failure})")
        return cast(T, result)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


class GradientSums:
    """Sums of the gradients of all processes, begun while the last backward pass of a step runs.

    Gradients leave in buckets, those of the last layers first, and in the same order in every
    process: a bucket when all of its gradients are there and the one before it has left.  What has
    left is not sent again, should the backward pass end for lack of memory and be computed in
    pieces after all.

    Args:
        world: the processes.
        parameters: of the model; those that require no gradient are left out while it is so.
    """

    def __init__(self, world: World, parameters: Iterable[nn.Parameter]) -> None:
        self._world = world
        self._parameters = list(parameters)[::-1]
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._hooked: set[nn.Parameter] = set()
        self._unused: set[nn.Parameter] = set()  # had no gradient after the last backward pass
        self._awaited: list[set[nn.Parameter]] = []
        self._sent: list[tuple[Tensor, dist.Work | None]] = []
        self._is_open = False

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """In it runs the last backward pass of a step, if it is the whole of a share."""
        if self._world.size == 1:
            yield
            return
        self._lay_out()
        self._awaited = [set(bucket) - self._unused for bucket in self._buckets]
        self._is_open = True
        try:
            yield
            self._unused = {p for bucket in self._buckets for p in bucket if p.grad is None}
        finally:
            self._is_open = False

    def finish(self, numbers: Tensor) -> Tensor:
        """Puts the sums in the place of the gradients.

        Args:
            numbers: (n,) float32, which are summed as well.

        Returns:
            The sums of the numbers.
        """
        if self._world.size == 1:
            return numbers
        self._lay_out()
        while len(self._sent) < len(self._buckets):
            self._send()
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        for bucket, (sums, work) in zip(self._buckets, self._sent, strict=True):
            if work is not None:
                work.wait()
            sizes = [p.numel() for p in bucket]
            for parameter, value in zip(bucket, torch.split_with_sizes(sums, sizes), strict=True):
                parameter.grad = value.view_as(parameter)
        self._sent = []
        return numbers

    def _lay_out(self) -> None:
        """Deals the parameters that are trained into buckets, if others are than before."""
        trained = [p for p in self._parameters if p.requires_grad]
        if len(trained) == len(self._bucket_of) and all(p in self._bucket_of for p in trained):
            return
        self._buckets, size = [], BUCKET
        for parameter in trained:
            if size + parameter.numel() > BUCKET:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel()
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._unused = set()
        for parameter in set(trained) - self._hooked:
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
        self._hooked |= set(trained)

    def _take(self, parameter: Tensor) -> None:
        """A parameter has its gradient."""
        if not self._is_open or parameter not in self._bucket_of:
            return
        own = cast(nn.Parameter, parameter)
        if self._bucket_of[own] < len(self._sent):
            raise RuntimeError("a gradient came after its bucket had left: it had none before")
        self._awaited[self._bucket_of[own]].discard(own)
        while len(self._sent) < len(self._buckets) and not self._awaited[len(self._sent)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        flat = torch.cat(
            [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
        )
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))


@contextmanager
def join_world() -> Iterator[World]:
    """Meets the other processes that torchrun or srun started, if any.

    Raises:
        ValueError: there are more processes than GPUs on this node.
    """
    environment = slurm_environment(os.environ) or dict(os.environ)
    size = int(environment.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    os.environ.update(environment)
    world = World(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]))
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {world.local_rank} of this node has no GPU: there are "
                f"{torch.cuda.device_count()}; start at most one process for each"
            )
        torch.cuda.set_device(world.device)
    # What the hosts tell each other goes through gloo on either kind of machine.
    end_with_parent()
    # While the writer makes a Shar or blocks of millions of cuts, the others wait for hours.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables that torchrun would set, where srun has started several tasks without it."""
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    nodes = environment["SLURM_STEP_NODELIST"]
    first = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }
