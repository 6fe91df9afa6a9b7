"""A pytest plugin that runs transformers' tests with attention from this library. It reads two environment variables:

VIX_ATTENTION: the attention implementation that models use instead of their default, such as "vix_nystrom".
VIX_PATCH: if set, every newly created Nystromformer and FNet model is patched.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torchvision_operators

DECLARED = torchvision_operators.declare() if torchvision_operators.mismatch() else None

from transformers import PreTrainedModel  # noqa: E402
from transformers.models.fnet.modeling_fnet import FNetModel  # noqa: E402
from transformers.models.nystromformer.modeling_nystromformer import NystromformerModel  # noqa: E402

from vix_kernels.integrations import transformers as vix  # noqa: E402

SELECTION = ("sdpa", "eager", "set_attention", "attn_implementation")  # parts of names of tests that choose an implementation
current: list[str] = [""]  # the name of the running test


def pytest_runtest_setup(item: pytest.Item) -> None:
    current[0] = item.name


def use(attention: str) -> None:
    """Make `attention` the default implementation for all models, except in tests whose names contain an entry of SELECTION.

    `attention` also replaces "eager", because most tests select "eager" only to get attention weights.
    """
    vix.register()
    correct = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(correct)
    def chosen(self: PreTrainedModel, requested: str | None, *args: Any, **options: Any) -> str:
        changed = requested in (None, "eager") and not any(word in current[0] for word in SELECTION)
        return correct(self, attention if changed else requested, *args, **options)

    PreTrainedModel.get_correct_attn_implementation = chosen


def patch_after_creation(kind: type[PreTrainedModel]) -> None:
    create = kind.__init__

    @functools.wraps(create)
    def created(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        vix.patch(self)

    kind.__init__ = created


if os.environ.get("VIX_ATTENTION"):
    use(os.environ["VIX_ATTENTION"])
if os.environ.get("VIX_PATCH"):
    for each in (NystromformerModel, FNetModel):
        patch_after_creation(each)
