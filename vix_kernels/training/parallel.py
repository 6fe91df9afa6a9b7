"""Training with DDP or FSDP2 in several processes that torchrun starts.

The batches are the same as in a single process. The images of each batch are split among the processes. The random numbers for
an image do not depend on the process that gets it, so a run can be resumed with a different number of processes. Apart from
rounding errors, only dropout, stochastic depth and the batch-norm statistics depend on the number of processes. Each process
computes the batch-norm statistics from its local images.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .config import SharedError, UserError

T = TypeVar("T")
BLOCKS = ("blocks", "layers", "network", "stages")  # names of block lists in models from this library and timm
_connections = count()


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and methods for communication with the other processes.

    Attributes:
        rank: the number of this process, starting at 0.
        world: the number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the first process, which prints messages and writes files.

        With --fsdp, the other processes also write files: their shards of each checkpoint.
        """
        return self.rank == 0

    def share(self, batch: int) -> Tensor | None:
        """Return the positions of this process's images in a batch of size `batch`, or None if it gets all images.

        The positions form pairs (i, batch - 1 - i), because `augment.mix` mixes the two images of a pair.
        """
        if self.world == 1:
            return None
        front = torch.arange(batch // 2)[self.rank :: self.world]
        middle = [batch // 2] if batch % 2 and self.rank == self.world - 1 else []
        return torch.cat([front, torch.tensor(middle, dtype=torch.long), batch - 1 - front.flip(0)])

    def least(self, batch: int) -> int:
        """Return a lower bound on the number of images that a process gets from a batch of size `batch`."""
        return batch if self.world == 1 else 2 * (batch // 2 // self.world)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """Return the maximum of `number` over all processes. The reduction runs on the CPU, without GPU synchronization."""
        if self.world == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def union(self, names: set[str]) -> set[str]:
        """Return the union of `names` over all processes."""
        if self.world == 1:
            return names
        gathered: list[set[str]] = [set()] * self.world
        dist.all_gather_object(gathered, names)
        return set().union(*gathered)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """If the `with` block fails in one process, raise the error in all processes.

        All processes must enter the block. The block must not call a collective after an operation that may fail, because the
        other processes would wait forever.

        Raises:
            SharedError: one or more processes raised a UserError or an OSError. A run with only one process raises the original
                error instead.
        """
        error = None
        try:
            yield
        except (UserError, OSError) as caught:
            if self.world == 1:
                raise
            error = caught
        if self.largest(error is not None):
            self._raise_shared(error)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over `items`, and return when all processes have reached the end.

        If getting an item fails in one process, raise the error in all processes.
        """
        if self.world == 1:
            yield from items
            return
        items = iter(items)
        ended, ready, failed = range(3)
        while True:
            error, state = None, ready
            try:
                item = next(items)
            except StopIteration:
                state = ended
            except (UserError, OSError) as caught:
                error, state = caught, failed
            shared_state = self.largest(state)
            if shared_state == failed:
                self._raise_shared(error)
            if shared_state == ended:
                return
            if state == ready:
                yield item

    def _raise_shared(self, error: Exception | None) -> None:
        texts: list[str | None] = [None] * self.world
        dist.all_gather_object(texts, error and str(error))
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise SharedError(text if texts.count(text) == self.world else f"process {rank}: {text}") from error

    def decided(self, decide: Callable[[], T]) -> T:
        """Call `decide` in the first process, and return its result in all processes. The result must be picklable."""
        result: list[Any] = [None]
        with self.agreed():
            if self.first:
                result = [decide()]
        if self.world > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]

    def fails_first(self) -> bool:
        """Record that this process has failed, and return whether it is the first to fail.

        After one process has failed, the others fail, too, because their connections to it break.
        """
        if self.world == 1:
            return True
        try:
            return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
        except RuntimeError:  # the process that hosts the store has ended
            return False

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block in the first process, then in the other processes.

        The other processes can use the files that the first process has downloaded.
        """
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


@contextmanager
def connected() -> Iterator[Ranks]:
    """For the duration of the block, connect the processes that torchrun started. Yield the `Ranks` of this process.

    If the caller has initialized torch.distributed, use its process group, which must support CPU tensors. Without torchrun and
    without a process group, this process runs alone.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    # torchrun's store survives a restart. Without a new prefix, the new processes might find the addresses of dead processes
    # and wait for them. An elastic number of nodes (--nnodes 1:2) is not supported, because a change in the number of nodes
    # does not change the restart count.
    store, rank, world = next(dist.rendezvous("env://"))
    # The connection number distinguishes successive connections of the same processes.
    name = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}, connection {next(_connections)}"
    store = dist.PrefixStore(name, store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard the parameters across the processes with FSDP2. Each process gathers the parameters of one block at a time.

    Blocks are the items of each `nn.ModuleList` and `nn.Sequential` whose name is in `BLOCKS`.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for name, module in reversed(list(model.named_modules())):  # inner blocks first
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.rpartition(".")[2] in BLOCKS:
            for block in module:
                if not isinstance(block, nn.ModuleList):  # FSDP2 shards only modules with a forward method
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` wrapped in DDP, which averages the gradients over all processes, as FSDP2 does."""
    # Do not broadcast buffers before each forward pass, because `average_batch_norm` averages them before they are used.
    # torch 2.13 renames this option and warns about the old name.
    parameters = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **{option: False})


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients locally inside the block, without averaging them over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield


def local_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters, or this process's shards of them if `model` is sharded."""
    return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


@torch.no_grad()
def average_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Average the running statistics of batch norm over all processes. Each process computes them from its local images."""
    if ranks.world == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(ranks.sum(statistic) / ranks.world)


def placed_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` on the device of `tensor`, sharded like `tensor`. A scalar is returned unchanged.

    Every process must pass the complete `value`.
    """
    if not value.ndim:
        return value
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device_mesh.device_type)
        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return value.to(tensor.device)


def load_placed(model: nn.Module, saved: dict[str, Any]) -> None:
    """Load a full (unsharded) state dict into `model`, which may be sharded."""
    own = model.state_dict()
    state = {name: placed_like(own[name], x) if isinstance(x, Tensor) and name in own else x for name, x in saved.items()}
    model.load_state_dict(state)
