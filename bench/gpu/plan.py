"""What a part is told, and how rows say how they went."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """dry: tiny sizes in Triton's interpreter. deadline: by time.monotonic(); what comes later is skipped, and says so."""

    dry: bool
    deadline: float

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wait(self) -> None:
        """For the device; raises again what it cannot recover from, such as an illegal access."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """What the last measurement held."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()


def ok(**row: Any) -> Row:
    return {**row, "status": "ok", "why": ""}


def failed(why: str | BaseException, **row: Any) -> Row:
    return {**row, "status": "failed", "why": brief(why)}


def skipped(why: str | BaseException, **row: Any) -> Row:
    return {**row, "status": "skipped", "why": brief(why)}


def brief(why: str | BaseException) -> str:
    if isinstance(why, torch.OutOfMemoryError):
        return "does not fit into the GPU's memory"
    if isinstance(why, BaseException):
        lines = str(why).strip().splitlines() or [""]
        why = f"{type(why).__name__}: {lines[0].strip()}"
    return why[:300]
