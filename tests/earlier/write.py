"""Record the models, runs and saved files of the current commit: `python -m tests.earlier.write FOLDER`.

    states.json    for each model, the names and shapes of the parameters in order, the names of the other state-dict
                   entries, some outputs, and the norm of all outputs
    run/           a run folder written by `vix train`, after the first of two epochs
    resumed.json   the metrics after the second epoch of that run
    model/         a folder written by save_model

states.json does not contain weights, because `fill` derives them from the names of the state-dict entries. The files in this
folder were written by this script at commit 5d75bb5.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix_kernels import nn as attention
from vix_kernels.models import create_model, save_model
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.testing.models import small_model

TRAIN = ["--model", "vip", "--dataset", "digits", "--epochs", "2", "-b", "256", "--model-ema", "--redraw-interval", "2"]
TINY = ["--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2", "patch_size=4"]
COMPARED = ("train_loss", "eval_loss", "eval_top1", "lr")
Subject = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a model and its inputs


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def subjects() -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Yield the name of each model and a function that builds it."""
    for name in PUBLISHED:
        yield f"create_model {name}", lambda name=name: (create_model(name, **small_model(name)), (normal(2, 3, 8, 8),), {})
    modules = {
        "Attention": {},
        "PerformerAttention": dict(num_features=20, seed=3),
        "LinearAttention": dict(feature_map="elu"),
        "NystromAttention": dict(num_landmarks=4, prefix_tokens=1, residual_conv_kernel=3),
        "LinformerAttention": dict(seq_len=12, num_landmarks=5),
        "AgentAttention": dict(num_agents=4, prefix_tokens=1),
        "FourierMixing": dict(norm="ortho"),
    }
    for name, options in modules.items():
        yield (
            f"nn.{name}",
            lambda name=name, options=options: (
                getattr(attention, name)(32, 2, qkv_bias=True, **options),
                (normal(2, 12, 32),),
                {},
            ),
        )
    yield from hosts()


def hosts() -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Yield models from other libraries in which attention is replaced with attention from this library."""
    ops = {
        "nystrom": dict(num_landmarks=4),
        "performer": dict(num_features=20, retrain=True),
        "linear": dict(retrain=True),
        "agent": dict(num_agents=4, retrain=True),
    }

    def timm_model(name: str, op: str) -> Subject:
        import timm

        from vix_kernels.integrations.timm import replace_attention

        model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, num_classes=5)
        exact = {} if op == "linear" else dict(exact_prefix=False)  # the recorded outputs have no exact rows
        replace_attention(model, op, **ops[op], **exact)
        return model, (normal(2, 3, 32, 32),), {}

    def encoder(op: str) -> Subject:
        from vix_kernels.integrations.torch_nn import replace_mha

        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
        replace_mha(model, op, **ops[op])
        return model, (normal(2, 16, 32),), {}

    def transformer(op: str) -> Subject:
        import transformers

        from vix_kernels.integrations.transformers import register

        register(retrain=True, nystrom=dict(num_landmarks=4), performer=dict(num_features=20), agent=dict(num_agents=4))
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
        )
        model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
        model.set_attn_implementation(f"vix_{op}")
        return model, (normal(2, 3, 32, 32),), {}

    def diffuser(op: str) -> Subject:
        import diffusers

        from vix_kernels.integrations.diffusers import replace_attention

        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10, norm_num_groups=4,
        )  # fmt: skip
        replace_attention(model, op, **ops[op])
        return model, (normal(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1])), {}

    for op in ops:
        yield f"timm vit {op}", lambda op=op: timm_model("vit_tiny_patch16_224", op)
        yield f"timm eva {op}", lambda op=op: timm_model("eva02_tiny_patch14_224", op)
        yield f"torch.nn {op}", lambda op=op: encoder(op)
        yield f"transformers {op}", lambda op=op: transformer(op)
        yield f"diffusers {op}", lambda op=op: diffuser(op)
    yield from peers()


def peers() -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Yield replacements for modules from other packages. They have the same class names and weights as these modules."""

    def fast_attention() -> Subject:
        from vix_kernels.integrations.performer_pytorch import FastAttention

        q, k, v = normal(3, 2, 2, 12, 16)
        return FastAttention(16, 20), (q, k, v), {}

    def nystrom() -> Subject:
        from vix_kernels.integrations.nystrom_attention import NystromAttention

        return NystromAttention(32, 16, 2, num_landmarks=4, residual_conv_kernel=3), (normal(2, 12, 32),), {}

    def linformer() -> Subject:
        from vix_kernels.integrations.linformer import LinformerSelfAttention

        return LinformerSelfAttention(32, 12, k=5, heads=2), (normal(2, 12, 32),), {}

    yield "performer_pytorch FastAttention", fast_attention
    yield "nystrom_attention NystromAttention", nystrom
    yield "linformer LinformerSelfAttention", linformer


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill every floating-point entry in the state dict with values derived from its name. Variances are positive.

    Random features keep their values, because they must follow a certain distribution and are determined by their seed.
    FastAttention has no seed, so its features are filled as well.
    """
    for name, x in model.state_dict().items():
        if isinstance(x, Tensor) and x.is_floating_point() and not name.endswith("projection"):
            seed = zlib.crc32(name.encode())
            numbers = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            x.copy_(1 + numbers.abs() / 4 if "var" in name else numbers / 8 + name.endswith("norm.weight"))


@torch.no_grad()
def describe(make: Callable[[], Subject]) -> dict[str, Any]:
    """Return the entry in states.json for one model."""
    torch.manual_seed(0)
    model, args, options = make()
    parameters = {name: list(x.shape) for name, x in model.named_parameters()}
    others = [name for name in model.state_dict() if name not in parameters]
    fill(model.eval())
    out = model(*args, **options)
    out = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else next(iter(out.values()))
    out = out.double().flatten()
    picked = out[torch.linspace(0, out.numel() - 1, min(8, out.numel())).long()]
    return {"parameters": parameters, "others": others, "norm": out.norm().item(), "outputs": picked.tolist()}


def main(folder: Path) -> None:
    from vix_kernels.__main__ import main as vix

    folder.mkdir(parents=True, exist_ok=True)
    states = {name: describe(make) for name, make in subjects()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(state)}" for name, state in states.items())
    (folder / "states.json").write_text(f"{{\n{lines}\n}}\n")
    torch.manual_seed(0)
    model = create_model("hybrid_vin", **small_model("hybrid_vin"))
    fill(model)
    save_model(model, folder / "model")
    os.chdir(folder)  # so that the settings saved in the run contain no absolute paths
    vix(["train", *TRAIN, *TINY, "--time-to", "1", "--output", "run"])  # stops after one epoch at any accuracy above 1%
    shutil.copytree("run", "resumed")
    vix(["train", "--resume", "resumed", "--time-to", "100"])
    with open("resumed/summary.csv") as file:
        last = list(csv.DictReader(file))[-1]
    Path("resumed.json").write_text(json.dumps({name: float(last[name]) for name in COMPARED}) + "\n")
    shutil.rmtree("resumed")
    for picture in Path("run").glob("*.png"):
        picture.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
