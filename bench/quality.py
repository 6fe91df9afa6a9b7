"""Measure how closely linear-cost attention methods approximate softmax attention as the number of slots grows.

The slots are random features, segment or grid landmarks, or pooled agents. The baseline is the mean of v. There are three sets
of tokens. For the first set, the script trains a transformer on images of digits. The set contains q, k and v for
held-out images (16 x 16 tokens). The second and third sets are smooth and rough random fields with known correlation lengths
(64 x 64 tokens). The error is |out - exact| / |exact| for one head and image, or for one field. In the figure, lines show
medians and bands show quartiles. No method is trained to approximate softmax attention. linformer_attention is skipped, because
its projections are trained parameters, and its error with random projections would say nothing about trained projections.

examples:
  python -m bench.quality --output docs/quality.png    also writes docs/quality.csv; two minutes on an idle core
  python -m bench.quality --output quality.png --quick

The script runs on the CPU and requires the `train` extra: pip install -e '.[train]'.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vix_kernels import agent_attention, nystrom_attention, orthogonal_projection, performer_attention
from vix_kernels.commands import Parser, write_atomically, write_csv
from vix_kernels.models import create_model
from vix_kernels.ops.pooling import pooled_queries
from vix_kernels.training import Config, UserError

WIDTH = 32  # head width
FIELD = 64  # tokens per side of a random field
FIELDS = {"smooth field": 8.0, "rough field": 2.0}  # standard deviation, in tokens, of the Gaussian that smooths the noise
MEAN = "mean of v"


@dataclass(frozen=True)
class Size:
    """Sizes of the study: the slot counts to compare, and the numbers of epochs, held-out images and random fields."""

    slots: tuple[int, ...]
    epochs: int
    images: int  # held-out images
    fields: int  # random fields of each kind


FULL = Size(slots=(16, 32, 64, 128, 256), epochs=8, images=32, fields=16)
QUICK = Size(slots=(16, 64), epochs=0, images=2, fields=2)


@dataclass(frozen=True)
class Tokens:
    """q, k and v of shape (1, heads, height * width, WIDTH), where `grid` is (height, width).

    Different images, layers and random fields are stored as different heads.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Row:
    """Median and quartiles over heads of |out - exact| / |exact|, where |x| is the Frobenius norm over tokens and channels."""

    tokens: str
    method: str
    slots: int
    median: float
    low: float
    high: float


def performer(x: Tokens, slots: int, seed: int) -> Tensor:
    # Each head has different random features, so the quartiles include the variation between draws.
    projection = orthogonal_projection(slots, WIDTH, seed=seed, num_heads=x.q.shape[1])
    return performer_attention(x.q, x.k, x.v, projection)


def nystrom(x: Tokens, slots: int, seed: int, **landmarks: Any) -> Tensor:
    return nystrom_attention(x.q, x.k, x.v, num_landmarks=slots, **landmarks)


def agent_grid(x: Tokens, slots: int, seed: int) -> Tensor:
    agents, _ = pooled_queries(x.q, slots, grid_size=x.grid, prefix_tokens=0, mask=None, backend="auto")
    return agent_attention(x.q, x.k, x.v, agents)


METHODS: dict[str, Callable[[Tokens, int, int], Tensor]] = {
    "Performer": performer,
    "Nystrom, segments": nystrom,
    "Nystrom, grid": lambda x, slots, seed: nystrom(x, slots, seed, landmarks="grid", grid_size=x.grid),
    "agents, grid": agent_grid,
}


def errors(x: Tokens, size: Size, seed: int) -> Iterator[Row]:
    exact = F.scaled_dot_product_attention(x.q, x.k, x.v)

    def row(method: str, slots: int, out: Tensor) -> Row:
        error = (out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
        low, median, high = error.flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return Row(x.name, method, slots, median, low, high)

    yield row(MEAN, 0, x.v.mean(2, keepdim=True))
    for method, function in METHODS.items():
        for slots in size.slots:
            yield row(method, slots, function(x, slots, seed))


def random_field(name: str, size: Size, seed: int) -> Tokens:
    """Return independent q, k and v: Gaussian noise on a torus, smoothed with a Gaussian and scaled to unit variance."""
    noise = torch.randn(3, 1, size.fields, WIDTH, FIELD, FIELD, generator=torch.Generator().manual_seed(seed))
    square = torch.fft.fftfreq(FIELD).square()
    response = torch.exp(-2 * (torch.pi * FIELDS[name]) ** 2 * (square[:, None] + square))
    field = torch.fft.ifft2(torch.fft.fft2(noise) * response).real
    field = field / field.std(dim=(-2, -1), keepdim=True)
    return Tokens(name, *rearrange(field, "qkv b h d y x -> qkv b h (y x) d").contiguous(), (FIELD, FIELD))


def trained_tokens(size: Size, seed: int) -> Tokens:
    """Train a softmax transformer on digits, and return q, k and v of all its layers and heads for held-out images.

    Images have 16 x 16 pixels, and each pixel is a token.
    """
    from tqdm import tqdm

    from vix_kernels.training.data import HeldImages, load_dataset, pixel_statistics
    from vix_kernels.training.loop import evaluate, train_epoch
    from vix_kernels.training.parallel import Ranks
    from vix_kernels.training.state import State

    def enlarged(images: Tensor) -> Tensor:
        return F.interpolate(images * (255 / 16), size=16, mode="bilinear").round().to(torch.uint8)

    digits = load_dataset("digits")
    train, test = (HeldImages(enlarged(part.images), part.labels) for part in (digits.train, digits.test))
    mean, std = pixel_statistics(train.images, max_value=255)
    digits = replace(digits, train=train, test=test, max_value=255, mean=mean, std=std)

    config = Config(model="hybrid_vit", epochs=size.epochs, batch_size=16, lr=1e-3, warmup_epochs=1, seed=seed)
    torch.manual_seed(seed)
    model = create_model(
        config.model, img_size=16, in_chans=1, embed_dim=2 * WIDTH, num_heads=2, class_token=False, global_pool="avg"
    )
    state = State(config, model, torch.device("cpu"), Ranks())
    steps = -(-len(train) // config.batch_size)
    with tqdm(total=size.epochs * steps, desc="training", unit="step", leave=False, disable=None) as progress:
        for _ in range(size.epochs):
            state.history.append(train_epoch(state, digits, progress.update))
            state.start_epoch()
    top1 = evaluate(model, digits, config)["eval_top1"]
    print(f"trained a softmax transformer on digits: top-1 {top1:.1f} % of {len(test)} held-out images", file=sys.stderr)

    layers: list[Tensor] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, inputs, output: layers.append(output))
    with torch.no_grad():
        model(digits.inputs(test.images[: size.images]))
    qkv = rearrange(torch.stack(layers), "l b n (qkv h d) -> qkv 1 (b l h) n d", qkv=3, d=WIDTH)
    return Tokens("trained tokens", *qkv.contiguous(), (16, 16))


def draw(path: Path, rows: list[Row]) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.tokens for row in rows))
    figure = Figure(figsize=(10, 3.9), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for panel, name in zip(panels, names, strict=True):
        for method in METHODS:
            line = [row for row in rows if (row.tokens, row.method) == (name, method)]
            slots = [row.slots for row in line]
            (drawn,) = panel.plot(slots, [row.median for row in line], "o-", markersize=4, label=method)
            panel.fill_between(
                slots, [row.low for row in line], [row.high for row in line], color=drawn.get_color(), alpha=0.15, linewidth=0
            )
        (mean,) = [row for row in rows if (row.tokens, row.method) == (name, MEAN)]
        panel.axhline(mean.median, color="black", linestyle="--", linewidth=1, label=MEAN)
        panel.set_xscale("log", base=2)
        panel.set(title=name, xlabel="features, landmarks or agents", yscale="log")
        panel.set_xticks(slots, slots)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("relative error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("bench.quality", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH.png", help="the figure; its numbers go to PATH.csv")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the model, fields and features (default: 0)")
    parser.add_argument("--quick", action="store_true", help="run a smoke test that takes seconds, with an untrained model")
    args = parser.parse_args(argv)
    if args.output.suffix != ".png":
        parser.error(f"--output: expected a path that ends in .png, got {args.output}")
    if not os.access(args.output.parent, os.W_OK) or not args.output.parent.is_dir():  # fail before minutes of work
        parser.error(f"--output: cannot write to the folder {args.output.parent}")
    size = QUICK if args.quick else FULL
    rows: list[Row] = []
    try:
        Config(seed=args.seed).check()
        for tokens in (trained_tokens(size, args.seed), *(random_field(name, size, args.seed) for name in FIELDS)):
            print(f"{tokens.name}: {tokens.grid[0]} x {tokens.grid[1]}", file=sys.stderr)
            rows += errors(tokens, size, args.seed)
        table = args.output.with_suffix(".csv")
        write_atomically(args.output, lambda path: draw(path, rows))
        write_csv(table, map(asdict, rows), digits=3)
        print(f"wrote {args.output}\nwrote {table}")
    except (UserError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is required: pip install 'vix_kernels[train]'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
