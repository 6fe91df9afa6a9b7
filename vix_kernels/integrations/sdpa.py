"""Replace torch's scaled_dot_product_attention inside a `with` block, for any model that calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .drop_in import DropIn


class SdpaReplacement(TorchFunctionMode):
    """Context manager in which `attention` replaces `scaled_dot_product_attention`. `replace_sdpa` returns it.

    Attributes:
        served: number of calls that `attention` computed.
        fell_back: number of calls that fell back to softmax attention, by reason.
    """

    def __init__(self, attention: DropIn, *, fall_back: bool = True) -> None:
        super().__init__()
        self.attention, self.fall_back = attention, fall_back
        self.served = 0
        self.fell_back: Counter[str] = Counter()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            try:
                out = self.attention(*args, **kwargs)
            except NotImplementedError as reason:
                if not self.fall_back:
                    raise
                self.fell_back[str(reason)] += 1
            else:
                self.served += 1
                return out
        return func(*args, **kwargs)

    def __str__(self) -> str:
        lines = [f"{self.attention!r}: {self.served} calls served, {self.fell_back.total()} fell back to softmax attention"]
        return "\n".join(lines + [f"  {count} times: {reason}" for reason, count in self.fell_back.most_common()])


def replace_sdpa(op: str, *, retrain: bool = False, **options: Any) -> SdpaReplacement:
    """Return a context manager that replaces `torch.nn.functional.scaled_dot_product_attention` with the attention method `op`.

        with replace_sdpa("nystrom", num_landmarks=64) as swap:
            y = model(x)
        print(swap)  # number of replaced calls, and the reasons why other calls fell back

    Unsupported calls fall back to softmax attention and are counted by reason. Examples are calls with causal attention,
    grouped-query attention, dropout, or a mask that is not a padding mask. Attention that a model computes with explicit matrix
    products is not replaced. nn.MultiheadAttention is also not replaced. Use replace_mha for models that contain it.

    The context manager only affects the current thread. If the backward pass recomputes the forward pass (activation
    checkpointing), also run the backward pass inside the context.

    Args:
        op, retrain, options: as in DropIn.
    """
    return SdpaReplacement(DropIn(op, retrain=retrain, **options).without_module())
