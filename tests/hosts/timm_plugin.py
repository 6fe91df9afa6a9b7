"""A pytest plugin that runs timm's tests on selected models. It reads two environment variables:

VIX_MODELS: names of the models to test, separated by commas. The tests of other models are not collected.
VIX_REPLACE: the operator, such as nystrom, that replaces softmax attention in these models. If empty, nothing is replaced.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from typing import Any

import pytest
import torchvision_operators

DECLARED = torchvision_operators.declare() if torchvision_operators.mismatch() else None

import timm  # noqa: E402

import vix_kernels.integrations.timm as vix  # noqa: E402

MODELS = os.environ["VIX_MODELS"].split(",")
OP = os.environ.get("VIX_REPLACE", "")
# The tests select models by name patterns and by timm's module names.
TOKENS = "vit_*"  # a pattern in timm's list of models whose features are tokens instead of maps
list_models, create_model = timm.list_models, timm.create_model


def chosen(
    filter: Any = "", module: Any = "", exclude_filters: Any = "", include_tags: Any = None, name_matches_cfg: bool = False,
    pretrained: bool = False, **options: Any,
) -> list[str]:  # fmt: skip
    """Return the models in MODELS that the arguments select. This function replaces timm.list_models.

    The models of vix_kernels are treated like timm's vision transformers. All feature extraction
    tests include them, but configuration tests only include them if the features are expected to be tokens.
    """
    if pretrained:
        return []
    ours = [name for name in MODELS if name.startswith("vix_")]
    if filter and (isinstance(filter, str) or TOKENS not in filter):
        ours = [name for name in ours if isinstance(filter, str) and fnmatch.fnmatch(name, filter)]
    if TOKENS in exclude_filters and include_tags:
        ours = []
    hosts = list_models(
        filter, module, exclude_filters=exclude_filters, include_tags=False, name_matches_cfg=name_matches_cfg, **options
    )
    return ours + [name for name in hosts if name in MODELS and not name.startswith("vix_")]


def replaced(create: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `create`, and then replaces the model's attention layers if VIX_REPLACE is set."""

    def call(name: str, *args: Any, **options: Any) -> Any:
        model = create(name, *args, **options)
        if OP:
            vix.replace_attention(model, OP)
        return model

    return call


timm.list_models = timm.models.list_models = chosen
timm.list_pretrained = lambda *args, **options: []  # do not download weights
timm.create_model = timm.models.create_model = replaced(create_model)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the tests of models in MODELS."""
    kept = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("model_name") in MODELS]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
