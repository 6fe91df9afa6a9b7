"""Show which backend each operator uses on this machine, and the reason if it is not Triton."""

from __future__ import annotations

import platform

import torch

from .. import __version__, backends
from ..commands import DTYPES, Parser
from ..testing import SPECS
from .machine import version_of


def main(argv: list[str]) -> int:
    parser = Parser.of("vix check", __doc__)
    parser.add_argument("--width", type=int, default=64, help="head width (default: 64)")
    width = parser.parse_args(argv).width

    print(f"vix_kernels {__version__}, torch {torch.__version__}, triton {version_of('triton')}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, head width {width}\n")

    reasons = {dtype: backends.reasons_against_triton(device, dtype, width) for dtype in DTYPES.values()}
    print("operator".ljust(22) + "".join(str(dtype).removeprefix("torch.").ljust(12) for dtype in DTYPES.values()))
    for name in (spec.name for spec in SPECS.values() if spec.public):
        chosen = (backends.resolve("auto", torch.empty(0, dtype=dtype, device=device), width) for dtype in DTYPES.values())
        print(name.ljust(22) + "".join(each.ljust(12) for each in chosen))
    for reason in dict.fromkeys(reason for each in reasons.values() for reason in each):
        print(f"\nnot triton: {reason}", end="")
    print()
    return 0
