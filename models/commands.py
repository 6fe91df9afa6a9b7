"""The commands `vix models` and `vix convert`."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vix_kernels.commands import KeyValues, Parser, print_table

from .originals import ORIGINALS, from_original
from .pretrained import save_model
from .zoo import create_model, list_models

CONVERT_EXAMPLES = """\
examples:
  vix convert --original ViP vip.pth converted --config image_size=32 patch_size=1 num_classes=10 dim=128 depth=4 heads=4 \\
      mlp_dim=256 dim_head=32
  python -c "from vix_kernels.models import load_model; print(load_model('converted'))"
"""


OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of torch.save's legacy format, which is not a zip file


class Summary(NamedTuple):
    """The size and cost of a model.

    Attributes:
        image: height and width of the input image.
        tokens: number of tokens in the first block, including the class token.
        parameters: number of parameters.
        macs: multiply-adds of matrix products and convolutions for one image. Fourier transforms are not counted.
    """

    image: tuple[int, int]
    tokens: int
    parameters: int
    macs: int


def summarize(name: str, **overrides: Any) -> Summary:
    """Return the size and cost of `create_model(name, **overrides)`, measured in a forward pass on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_model(name, **overrides, backend="reference").eval()
        model(torch.empty(1, model.in_chans, *model.img_size))
    (rows, columns), prefix = next(iter(model.token_maps().values()))
    parameters = sum(p.numel() for p in model.parameters())
    return Summary(model.img_size, prefix + rows * columns, parameters, counter.get_total_flops() // 2)


def models(argv: list[str]) -> int:
    parser = Parser(
        prog="vix models",
        description="List the models: image size, tokens in the first layer, parameters, and multiply-adds per image "
        "(matrix products and convolutions in plain PyTorch, without Fourier transforms).",
    )
    parser.add_argument("pattern", nargs="?", help='list only models whose names match this pattern, such as "hybrid_*"')
    pattern = parser.parse_args(argv).pattern
    names = list_models(pattern)
    if not names:
        parser.error(f"pattern: no model matches {pattern!r}; the models are {', '.join(list_models())}")
    rows = ((name, summarize(name)) for name in names)
    print_table(
        ("model", "image", "tokens", "parameters", "MACs"),
        (
            (name, "{} x {}".format(*s.image), f"{s.tokens:,}", f"{s.parameters:,}", f"{s.macs / 1e6:,.0f} M")
            for name, s in rows
        ),
        # With fixed widths, each row is printed as soon as it is ready. Computing all rows can take half a minute.
        widths=(max(map(len, names)), 9, 6, 11, 9),
    )
    return 0


def convert(argv: list[str]) -> int:
    parser = Parser(
        prog="vix convert",
        description="Convert the weights of an original Vision Xformers model to a folder for load_model: safetensors, "
        "config.json and a model card.",
        epilog=CONVERT_EXAMPLES,
    )
    parser.add_argument("weights", help="state_dict saved by torch.save (.pth, .pt); loading it runs no code from the file")
    parser.add_argument("output", help="folder to write; must be new or empty")
    parser.add_argument("--original", required=True, metavar="NAME", help=f"name of the original: {', '.join(ORIGINALS)}")
    parser.add_argument(
        "--config", nargs="+", action=KeyValues, default={}, metavar="K=V", help="constructor arguments of the original"
    )
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        parser.error(f"output: expected a new or empty folder, got {output}, which is neither")
    try:
        model = from_original(args.original, args.config, _read(Path(args.weights)))
        save_model(model, output)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"vix convert needs {error.name}: pip install 'vix_kernels[hub]'")
    print(f"{args.original}: {sum(p.numel() for p in model.parameters()):,} parameters, {output}")
    return 0


def _read(path: Path) -> Mapping[str, Tensor]:
    """Return the state_dict from the file `path`, which may store it under the key "state_dict" or "model"."""
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    try:
        with path.open("rb") as file:
            begins = file.read(len(OLD_FORMAT))
        if begins != OLD_FORMAT and not zipfile.is_zipfile(path):
            raise ValueError("neither a zip archive nor torch's legacy format")
        with warnings.catch_warnings():  # torch warns about pickle protocols that it may not support
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise many exception types for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or contains more than tensors ({reason}); save only model.state_dict()") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"weights: expected {path} to contain a state_dict, a dict from names to tensors")
    # DataParallel adds the prefix "module." to every name.
    return {key.removeprefix("module."): value for key, value in state.items()}
