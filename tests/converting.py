"""Models to convert, and functions that call `linearize` in several processes. The processes import this file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vix_kernels.linearize import convert, linearize
from vix_kernels.models import create_model


def small_model() -> nn.Module:
    return create_model("hybrid_vit", patch_size=4, depth=2)


def sharpened(model: nn.Module) -> nn.Module:
    """Scale up the query, key and packed qkv weights, so that attention is not uniform. Return `model` in eval mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", "in_proj_weight")):
                parameter.mul_(4)
    return model.eval()


def batches(*shape: int) -> Callable[[], Iterator[Tensor]]:
    data = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1)).split(16)
    return lambda: iter(data)


def convert_and_save(rank: int, world: int, folder: str) -> None:
    """Convert a model as process `rank` of `world` processes.

    Process 0 saves the first gradient, the layer errors and the agreement with the teacher in `folder`/{world}.pt.
    """
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


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(192, 4)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.attn(x, x, x, key_padding_mask=padded, need_weights=False)[0]


class Trimmed(nn.Module):
    """A model that trims a batch to the length of its longest sample."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 3, 192, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        longest = int((~padded).sum(1).max())
        return self.encoder(x[:, :longest], src_key_padding_mask=padded[:, :longest])


REFUSED = {
    "first": "batches: expected the same batches in all 2 processes, which split them, got different ones",
    "later": "batches: expected the same batches in all 2 processes",
    "tokens": "batches: expected samples in dimension 0, which 2 processes split, got another layout, such as that of nn.Mult",
    "dict": "batches: expected samples in dimension 0",
    "small": "batches: expected a function that returns at least one batch of 2 samples, one for each process, in every call",
    "lengths": "eval_batches: expected the same batches in all 2 processes",
}


def refuse(rank: int, folder: str) -> None:
    """As process `rank` of two, call `linearize` with batches that it must reject. Save the error messages."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    errors = {}
    for case in REFUSED:
        torch.manual_seed(0)
        model, data, evaluated = small_model(), list(batches(3, 32, 32)()), None
        if case in ("first", "later"):
            index = 0 if case == "first" else 2
            data[index] = data[index].roll(rank, 0)  # the same images in another order
        elif case == "lengths":
            evaluated = data[: 1 + rank]
        elif case == "small":
            data = [data[0][:1]]
        elif case in ("tokens", "dict"):
            model = TokensFirst()
            data = [x.view(16, 16, 192) for x in data]  # 16 tokens in dimension 0, and 16 samples in dimension 1
            if case == "dict":
                data = [{"x": x, "padded": torch.zeros(16, 16, dtype=torch.bool)} for x in data]
        kinds = [type(module) for module in model.modules()]
        options = dict(eval_batches=evaluated and (lambda evaluated=evaluated: evaluated), num_features=8, steps=2)
        try:
            linearize(model, lambda data=data: data, progress=False, **options)
        except ValueError as error:
            errors[case] = str(error)
        assert [type(module) for module in model.modules()] == kinds
    padded = torch.arange(16) >= torch.tensor([8, 16, 8, 8])[:, None]  # process 1 gets the longest sample
    trimmed = [{"x": torch.randn(4, 16, 192), "padded": padded}]
    assert linearize(Trimmed(), lambda: trimmed, num_features=4, steps=2, progress=False).converted
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
