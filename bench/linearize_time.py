"""Measure the time per image of converted models at several numbers of tokens. `make linearize` runs this script.

    python -m bench.linearize_time --output DIR
    python -m bench.linearize_time --output DIR --timm vit_tiny_patch16_224 --sides 32 64

The model is hybrid_vit as in `make linearize`, or a timm vision transformer. All models have random weights, because the time
does not depend on the weights. The batch size is 1. Each round calls every model once. Each row of linearize-time.csv
(NAME-time.csv for a timm model) contains the median time of one model. Times are CPU times of one thread. "no attention" is the
original model with its attention layers replaced by the identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix_kernels.commands import Parser, figure, print_table, within, write_csv
from vix_kernels.integrations.swap import replace_attention
from vix_kernels.measure.machine import commit, device_name
from vix_kernels.measure.timing import in_turns
from vix_kernels.models import create_model

FILE = "linearize-time.csv"
PATCH = 4
SIDES = (16, 24, 32, 48, 64)  # tokens per side of the image: 257 to 4,097 tokens with the class token
COUNTS = (16, 64)
# Name, op, and the option that sets the number of features or landmarks
METHODS = (
    ("random features", "performer", "num_features"),
    ("learned features", "feature", "num_features"),
    ("Nystrom, grid", "nystrom", "num_landmarks"),
)
Key = tuple[str, int]  # the method and its number of features or landmarks


class NoAttention(nn.Module):
    def forward(self, x: Tensor, *unused: Any, **options: Any) -> Tensor:
        return x


def hybrid_vit(depth: int, side: int) -> tuple[nn.Module, int]:
    """Return a model for images of side x side patches, and the size of the images."""
    size = PATCH * side
    return create_model("hybrid_vit", img_size=size, patch_size=PATCH, depth=depth, num_classes=10).eval(), size


def timm_vit(name: str, side: int) -> tuple[nn.Module, int]:
    """Return a timm model for images of side x side patches, and the size of the images."""
    import timm

    size = side * timm.create_model(name).patch_embed.patch_size[0]
    return timm.create_model(name, img_size=size).eval(), size


def models(model: Callable[[], nn.Module]) -> Iterator[tuple[Key, nn.Module]]:
    """Yield (key, model) for the model that `model` creates, its conversions, and the same model without attention.

    In the conversions, class tokens use exact softmax attention.
    """
    yield ("softmax", 0), model()
    for name, op, option in METHODS:
        for count in COUNTS:
            converted = model()
            report = replace_attention(converted, op, retrain=True, **{option: count})
            yield (name, count), converted
    without = model()
    for layer in report.attentions:
        without.set_submodule(layer, NoAttention())
    yield ("no attention", 0), without


def measured(build: Callable[[int], tuple[nn.Module, int]], side: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each model, with its median time per image in milliseconds."""
    size = build(side)[1]
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    calls: dict[Key, Callable[[], Tensor]] = {key: partial(model, x) for key, model in models(lambda: build(side)[0])}
    with torch.inference_mode():
        times = in_turns(calls, rounds=rounds)
    rows = []
    for (method, slots), time in times.items():
        row = dict(tokens=side * side + 1, method=method, slots=slots, ms=time.median, low_ms=time.low, high_ms=time.high)
        ratio = time.median / times["softmax", 0].median
        rows.append(row | dict(ratio=ratio, rounds=rounds, device=device_name("cpu"), commit=commit()))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("bench.linearize_time", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the table")
    parser.add_argument("--timm", metavar="NAME", help="a timm vision transformer (default: hybrid_vit)")
    parser.add_argument("--sides", type=within(8, 256), nargs="+", default=SIDES, help="tokens per side of the image")
    parser.add_argument("--depth", type=within(1, 48), default=6, help="layers of hybrid_vit (default: %(default)s)")
    parser.add_argument("--rounds", type=within(1, 1000), default=9, help="calls of each model (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options.output.mkdir(parents=True, exist_ok=True)
    build = partial(timm_vit, options.timm) if options.timm else partial(hybrid_vit, options.depth)
    file = options.output / (f"{options.timm}-time.csv" if options.timm else FILE)
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        rows += measured(build, side, options.rounds)
        write_csv(file, rows)
    columns = ("tokens", "method", "slots", "ms", "ratio")
    print_table(columns, [[figure(row[name]) for name in columns] for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
