"""Helper functions of `linearize` for batches and model outputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.speed import call, tensors
from ..training.parallel import Ranks

Batches = Callable[[], Iterable[Any]]


def drawn(name: str, batches: Batches, least: int = 1) -> Iterator[Any]:
    """Call `batches` once, and return an iterator over the batches that have at least `least` samples.

    Raises:
        TypeError: `batches` is not a function that returns an iterable. The message refers to the function as `name`.
    """
    if not callable(batches):
        raise TypeError(f"{name}: expected a function that returns a fresh iterator, got {type(batches).__name__}")
    found = batches()
    try:
        iterator = iter(found)
    except TypeError:
        what = type(found).__name__
        raise TypeError(f"{name}: expected a function that returns a fresh iterator, got one that returns {what}") from None
    return (batch for batch in iterator if size_of(batch, name) >= least)


def endless(batches: Batches, least: int = 1) -> Iterator[Any]:
    """Yield batches forever, skipping those with fewer than `least` samples. `batches` is called again after each pass.

    Raises:
        TypeError: `batches` is not a function that returns an iterable.
        ValueError: a pass has no batch with at least `least` samples.
    """
    while True:
        empty = True
        for batch in drawn("batches", batches, least):
            empty = False
            yield batch
        if empty:
            of = f" of {least} samples, one for each process," if least > 1 else ""
            raise ValueError(f"batches: expected a function that returns at least one batch{of} in every call, got none")


def size_of(batch: Any, name: str = "batches") -> int:
    """Return the number of samples in a batch. `name` is the name of the argument in error messages."""
    if not any(x.dim() for x in tensors(batch)):
        raise TypeError(f"{name}: expected tensors, tuples or dicts of tensors, got {type(batch).__name__}")
    return len(next(x for x in tensors(batch) if x.dim()))


def part_of(batch: Any, rank: int, world: int) -> Any:
    """Return every `world`-th sample of a batch, starting with sample `rank`. Inference tensors are copied."""
    size = size_of(batch)

    def part(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x[rank::world] if world > 1 and x.dim() and len(x) == size else x
        return x.clone() if x.is_inference() else x  # autograd cannot save an inference tensor for the backward pass

    if isinstance(batch, Mapping):
        return {name: part(x) for name, x in batch.items()}
    return [part(x) for x in batch] if isinstance(batch, (tuple, list)) else part(batch)


def checksum(batches: Iterable[Any], start: int = 0) -> int:
    """Return a checksum of the tensors in the batches. `start` is the checksum of the preceding batches."""
    for x in (x for batch in batches for x in tensors(batch)):
        start = zlib.crc32(f"{x.dtype} {x.layout} {x.is_nested or tuple(x.shape)}".encode(), start)
        for part in _dense(x.detach()):
            content = part.cpu().resolve_conj().resolve_neg().contiguous()
            start = zlib.crc32(content.view(-1).view(torch.uint8).numpy(), start)
    return start


def _dense(x: Tensor) -> list[Tensor]:
    """Return dense tensors with the content of `x`, or an empty list for a meta tensor."""
    if x.is_meta:
        return []
    if x.is_nested:
        return list(x.unbind())
    return [x if x.layout is torch.strided else x.to_dense()]


def check_same(name: str, batches: Iterable[Any], ranks: Ranks) -> None:
    """Check that all processes have the same batches.

    Raises:
        ValueError: the batches differ. All processes raise this error.
    """
    if ranks.world == 1:
        return
    if len(ranks.union({str(checksum(batches))})) > 1:
        raise ValueError(
            f"{name}: expected the same batches in all {ranks.world} processes, which split them, got different ones: "
            "use the same seed, and no sampler that splits the samples"
        )


def output_of(result: Any) -> Tensor:
    """Return the output tensor of a model: `result` itself, its logits or last_hidden_state, or its first item."""
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(result, name, None), Tensor):
            return found
    first = result[0] if isinstance(result, (tuple, list)) or hasattr(result, "__getitem__") else None
    if not isinstance(first, Tensor):
        raise TypeError(f"model: expected a model that returns a tensor or logits, got {type(result).__name__}")
    return first


@torch.no_grad()
def output(model: nn.Module, batch: Any) -> Tensor:
    return output_of(call(model, batch)).float()
