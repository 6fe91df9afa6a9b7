"""Detect a torchvision built for a different PyTorch, for example PyPI's Linux wheel installed with a CPU build of PyTorch.

The operators of such a torchvision cannot be loaded. `import timm` imports torchvision and raises "operator torchvision::nms
does not exist". `make` runs this file after setup to report the mismatch in one line. After a call to `declare`, tests that
import timm or transformers can run anyway, because they do not call torchvision's operators.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch


def mismatch() -> str | None:
    """Return a one-line message if the installed torchvision does not match torch, else None. The check runs only on Linux."""
    spec = find_spec("torchvision")
    if sys.platform != "linux" or spec is None:
        return None
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
            return None
    except OSError:
        pass
    versions = f"torchvision {version('torchvision')} does not match torch {torch.__version__}"
    return f"{versions}, so timm cannot be imported: docs/integrations.md says how to install the matching one"


def declare() -> torch.library.Library:
    """Declare the operators that `import torchvision` needs, without implementations.

    The operators exist for as long as the returned object is alive.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return library


if __name__ == "__main__" and (line := mismatch()):
    print(line)
