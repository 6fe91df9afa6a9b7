"""A small model to convert, and a conversion that runs in several processes. The processes import this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vix_kernels.linearize import convert, linearize
from vix_kernels.models import create_model


def small_model() -> nn.Module:
    return create_model("hybrid_vit", patch_size=4, depth=2)


def sharpened(model: nn.Module) -> nn.Module:
    """Enlarge the weights of queries and keys, so that attention is not uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", "in_proj_weight")):
                parameter.mul_(4)
    return model.eval()


def batches(*shape: int) -> Callable[[], Iterator[Tensor]]:
    data = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1)).split(16)
    return lambda: iter(data)


def convert_and_save(rank: int, world: int, folder: str) -> None:
    """Convert a model in `world` processes. Save the gradient of the first step, and the errors and agreement of the report."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    gradients = []
    add = convert.Conversion.add_gradients

    def recorded(self: convert.Conversion, parameters: list[nn.Parameter]) -> None:
        add(self, parameters)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    convert.Conversion.add_gradients = recorded
    torch.manual_seed(0)
    report = linearize(sharpened(small_model()), batches(3, 32, 32), num_features=8, steps=20, progress=False)
    if rank == 0:
        torch.save((gradients[0], [each.after for each in report.layers.values()], report.agreement), f"{folder}/{world}.pt")
    dist.destroy_process_group()
