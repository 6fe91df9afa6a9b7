"""Training in several processes, as torchrun starts them: DDP, or FSDP2, over the same batches as in one.

A step's batch is divided among the processes. Who gets which images never changes what is drawn for them, so that the number of
processes may change when a run goes on. Only dropout and the statistics of batch norm, which every process takes of its own
images, tell runs of different numbers of processes apart.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `world`. Alone, it sends nothing."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """The one that speaks and writes."""
        return self.rank == 0

    def share(self, batch: int) -> Tensor | None:
        """The places of this process's images in a batch; None for all.

        With every place its mirror image, which `augment.mix` pairs it with.
        """
        if self.world == 1:
            return None
        front = torch.arange(batch // 2)[self.rank :: self.world]
        middle = [batch // 2] if batch % 2 and self.rank == self.world - 1 else []
        return torch.cat([front, torch.tensor(middle, dtype=torch.long), batch - 1 - front.flip(0)])

    def least(self, batch: int) -> int:
        """Images of such a batch that every process gets at least."""
        return batch if self.world == 1 else 2 * (batch // 2 // self.world)

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """Of all processes; sent from CPU to CPU, so that no device has to be waited for."""
        if self.world == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def union(self, names: set[str]) -> set[str]:
        """Of all processes."""
        if self.world == 1:
            return names
        gathered: list[set[str]] = [set()] * self.world
        dist.all_gather_object(gathered, names)
        return set().union(*gathered)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run the block in all processes, and raise the error of one in all. In the block, no collective follows what may fail.

        Raises:
            SharedError: one or more processes raised a UserError or an OSError. Alone, a process raises its own error.
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
        """Iterate over `items` in all processes until none has any left, and raise the error of one in all."""
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
            together = self.largest(state)
            if together == failed:
                self._raise_shared(error)
            if together == ended:
                return
            if state == ready:
                yield item

    def _raise_shared(self, error: Exception | None) -> None:
        texts: list[str | None] = [None] * self.world
        dist.all_gather_object(texts, error and str(error))
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise SharedError(text if texts.count(text) == self.world else f"process {rank}: {text}") from error

    def decided(self, decide: Callable[[], T]) -> T:
        """What `decide` returns in the first process, the only one that calls it. It has to be picklable."""
        result: list[Any] = [None]
        with self.agreed():
            if self.first:
                result = [decide()]
        if self.world > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]

    def fails_first(self) -> bool:
        """Whether no other process has called this. A process that ends breaks its connections, and so all others fail."""
        if self.world == 1:
            return True
        try:
            return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
        except RuntimeError:  # the process that keeps the store has ended
            return False

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block, then the others: what it has downloaded is there for them."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


@contextmanager
def connected() -> Iterator[Ranks]:
    """Those that the caller has connected, or torchrun has started, for the time of the block; else this process alone.

    A caller's connection has to serve tensors of the CPU, too.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    # torchrun's store outlives a restart. Without a place of their own in it, the new processes may find the addresses of the
    # dead, and wait for them. Nodes that come and go (--nnodes 1:2) change no count: they are not supported.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, device: torch.device) -> None:
    """Divide the parameters among the processes (FSDP2); each gathers those of one block at a time."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # inner blocks first
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """To be called in the place of `model`: its gradients become the mean over all processes (DDP), as FSDP2's do."""
    # Nobody else's buffers before every forward; torch 2.13 has a new word for it and complains of the old one.
    words = inspect.signature(DistributedDataParallel).parameters
    own_buffers = "forward_sync_buffers" if "forward_sync_buffers" in words else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **{own_buffers: False})


@contextmanager
def gradients_stay(model: nn.Module) -> Iterator[None]:
    """In the block gradients are added up here, and not yet over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield


def local_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters, or what this process has of them."""
    return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


@torch.no_grad()
def average_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Give the running statistics of batch norm, which every process takes of its own images, their mean over all."""
    if ranks.world == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(ranks.sum(statistic) / ranks.world)


def placed_like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, whole in every process, on the device and in the division of `tensor`. A number stays on the CPU."""
    if not value.ndim:
        return value
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device_mesh.device_type)
        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return value.to(tensor.device)


def load_placed(model: nn.Module, saved: dict[str, Any]) -> None:
    """`model.load_state_dict` of whole tensors, whether `model` is divided or not."""
    here = model.state_dict()
    state = {name: placed_like(here[name], x) if isinstance(x, Tensor) and name in here else x for name, x in saved.items()}
    model.load_state_dict(state)
