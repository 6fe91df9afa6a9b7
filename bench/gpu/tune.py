"""Search for faster launch configurations, as `vix dev tune` does, for up to 12 seconds per launch-table key (see `keys`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from vix_kernels._triton.launch import architecture, kernel_name
from vix_kernels._triton.launch_table import Key, entries
from vix_kernels.measure import tune
from vix_kernels.measure.operators import Row, ok, skipped

from .part import Job, Plan, by_job

# The kernels of `aggregate` and `broadcast` come first, because most operators launch them.
KERNELS = (
    "broadcast_forward", "aggregate_forward", "aggregate_tokens", "broadcast_tokens", "broadcast_slots", "aggregate_slots",
    "pinv_backward", "linear_aggregate_forward", "linear_broadcast_forward", "linear_aggregate_tokens",
    "linear_broadcast_tokens", "linear_broadcast_slots", "project_forward", "project_tokens", "project_weights", "pinv_forward",
)  # fmt: skip
SECONDS = 12  # per key; improving many keys a little is worth more than tuning one key fully


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    for key in tune.DRY if plan.dry else keys(plan):
        yield Job(dict(zip(("kernel", "bits", "width"), key, strict=True)), partial(tuned, plan, key))


def keys(plan: Plan) -> list[Key]:
    """Return the launch-table keys to tune: those of KERNELS for 16-bit dtypes and head widths 32 and 64.

    Keys without a suffix such as "_heavy" come first.
    """
    names = {key: kernel_name(key[0]) for key in entries(architecture(torch.device(plan.device)))}
    chosen = (key for key, name in names.items() if name in KERNELS and key[1] == 16 and key[2] in (32, 64))
    return sorted(chosen, key=lambda key: (key[0] != names[key], -key[2], KERNELS.index(names[key])))


def tuned(plan: Plan, key: Key) -> Iterator[Row]:
    arch = architecture(torch.device(plan.device))
    tune.users(arch, key[2], key[1], plan.device)  # fill the cache of users(), so that this does not count against SECONDS
    found = list(tune.tune([key], arch, plan.device, min(plan.deadline, time.monotonic() + SECONDS)))
    yield from (ok(**tune.row(proposal), arch=arch) for proposal in found)
    if not found:
        yield skipped("no benchmark looks up this entry")
