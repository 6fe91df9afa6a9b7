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


OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's files begin that are no zip archives


class Summary(NamedTuple):
    """Attributes:
    image: height and width.
    tokens: of the first attention, with the class token.
    parameters: learned numbers.
    macs: multiply-adds of matrix products and convolutions for one image; Fourier transforms are not counted.
    """

    image: tuple[int, int]
    tokens: int
    parameters: int
    macs: int


def summarize(name: str, **overrides: Any) -> Summary:
    """What `create_model(name, **overrides)` is, counted on a run without data."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_model(name, **overrides, backend="reference").eval()
        model(torch.empty(1, model.in_chans, *model.img_size))
    (rows, columns), prefix = next(iter(model.token_maps().values()))
    parameters = sum(p.numel() for p in model.parameters())
    return Summary(model.img_size, prefix + rows * columns, parameters, counter.get_total_flops() // 2)


def models(argv: list[str]) -> int:
    parser = Parser(
        prog="vix models",
        description="List the models: image, tokens of the first attention, parameters, and multiply-adds for an image "
        "(of matrix products and convolutions in plain PyTorch; Fourier transforms are not counted).",
    )
    parser.add_argument("pattern", nargs="?", help='only names like this, such as "hybrid_*"')
    pattern = parser.parse_args(argv).pattern
    names = list_models(pattern)
    if not names:
        parser.error(f"no model is called like {pattern!r}; all are {', '.join(list_models())}")
    rows = ((name, summarize(name)) for name in names)
    print_table(
        ("model", "image", "tokens", "parameters", "MACs"),
        (
            (name, "{} x {}".format(*s.image), f"{s.tokens:,}", f"{s.parameters:,}", f"{s.macs / 1e6:,.0f} M")
            for name, s in rows
        ),
        widths=(max(map(len, names)), 9, 6, 11, 9),  # all of them take half a minute on a slow machine
    )
    return 0


def convert(argv: list[str]) -> int:
    parser = Parser(
        prog="vix convert",
        description="Turn the weights of an original Vision Xformers model into a folder that load_model reads: safetensors, "
        "config.json and a model card.",
        epilog=CONVERT_EXAMPLES,
    )
    parser.add_argument("weights", help="state_dict saved by torch.save (.pth, .pt); read without running any code in it")
    parser.add_argument("output", help="folder to write; it must not hold a model yet")
    parser.add_argument("--original", required=True, metavar="NAME", help=f"its label: {', '.join(ORIGINALS)}")
    parser.add_argument(
        "--config", nargs="+", action=KeyValues, default={}, metavar="K=V", help="arguments that the original was made with"
    )
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        parser.error(f"{output} exists and is not empty: name another folder")
    try:
        model = from_original(args.original, args.config, _read(Path(args.weights)))
        save_model(model, output)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"it needs {error.name}: pip install 'vix_kernels[hub]'")
    print(f"{args.original}: {sum(p.numel() for p in model.parameters()):,} parameters, {output}")
    return 0


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state_dict in `path`, alone or as an entry "state_dict" or "model"."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        with path.open("rb") as file:
            begins = file.read(len(OLD_FORMAT))
        if begins != OLD_FORMAT and not zipfile.is_zipfile(path):
            raise ValueError("neither a zip archive nor the format before that")
        with warnings.catch_warnings():  # of a pickle that it may not understand
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have many kinds for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason}); save model.state_dict() alone") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path} holds no state_dict")
    # What DataParallel puts in front of every name
    return {key.removeprefix("module."): value for key, value in state.items()}
