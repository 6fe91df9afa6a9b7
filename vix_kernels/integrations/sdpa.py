"""Any model that calls torch's scaled_dot_product_attention: another attention in its place, for the length of a `with`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .drop_in import DropIn


class SdpaReplacement(TorchFunctionMode):
    """What `replace_sdpa` returns: a context in which `scaled_dot_product_attention` is `attention`.

    Attributes:
        served: how many calls the attention served.
        fell_back: how many went on to softmax attention, by reason.
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
    """A context in which `torch.nn.functional.scaled_dot_product_attention` is another attention.

        with replace_sdpa("nystrom", num_landmarks=64) as swap:
            y = model(x)
        print(swap)  # how many calls were served, and why others fell back

    Calls that the attention cannot serve (a mask that is not padding, causal, dropout, grouped heads) fall back to softmax
    attention and are counted with their reason. Models that multiply matrices themselves, and nn.MultiheadAttention, never
    call the function: see replace_mha. Only the thread that entered is served. Where a model computes again in backward
    (gradient checkpointing), that has to be inside of the context, too.

    Args:
        op, retrain, options: as in DropIn.
    """
    return SdpaReplacement(DropIn(op, retrain=retrain, **options).without_module())
