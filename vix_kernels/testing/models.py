"""Arguments for models that are small enough for quick tests."""

from __future__ import annotations

from typing import Any


def small_model(name: str, **overrides: Any) -> dict[str, Any]:
    """Return arguments of `create_model` for a small model that accepts 8 x 8 images and has no stochastic depth."""
    arguments: dict[str, Any] = {"img_size": 8, "embed_dim": 16, "num_classes": 5, "drop_path_rate": 0.0}
    if not name.startswith("fnet_2d"):
        arguments |= {"num_heads": 2}
    if name.startswith("cc"):
        arguments |= {"strides": (2,), "depth": 2}
    elif name.startswith("cv"):
        arguments |= {"embed_kernel": (3, 3), "embed_stride": (2, 1), "depth": 1}
    else:
        arguments |= {"patch_size": 2, "depth": 2}
    return arguments | overrides
