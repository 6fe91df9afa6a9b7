"""Base class of all models. It provides the classification head and an interface like timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vix_kernels.nn.dropout import Dropout

from .arguments import check_choice, check_counts, check_rates, pair
from .layers import init_linear


class Backbone(nn.Module):
    """Base class of models that map images (B, in_chans, *img_size) to logits (B, num_classes).

    A subclass implements `forward_features`, which returns tokens (B, num_prefix_tokens + patches, num_features), and calls
    `finish` at the end of its constructor.
    """

    config: dict[str, Any]  # entries that `save_model` writes to config.json, such as the arguments of `create_model`
    # Supported values of global_pool: "token" = class token, "avg" = mean of the patches, "seq" = mean with learned weights
    pools = ("avg",)

    def __init__(self, *, img_size: int | tuple[int, int], in_chans: int, drop_rate: float) -> None:
        super().__init__()
        check_counts(in_chans=in_chans)
        check_rates(drop_rate=drop_rate)
        self.img_size = pair("img_size", img_size)
        self.in_chans = in_chans
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False
        self.head_drop = Dropout(drop_rate)

    def finish(self, num_features: int, num_classes: int, global_pool: str) -> None:
        """Create the head and initialize all linear layers."""
        self.num_features, self.global_pool = num_features, global_pool
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the class token and the position parameters, which should have no weight decay.

        The caller must also exclude biases and norms from weight decay.
        """
        exempt = ("cls_token", "pos_embed", "rope.frequencies", "attention_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable activation checkpointing, which saves only the inputs of the blocks for backward."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one. num_classes=0 removes the head."""
        chosen = {} if global_pool is None or len(self.pools) == 1 else {"global_pool": global_pool}
        global_pool = self.global_pool if global_pool is None else global_pool
        check_choice(self.pools, global_pool=global_pool)
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError('global_pool: expected "avg" with class_token=False, got "token"')
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes: expected an integer >= 0, got {num_classes!r}")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if hasattr(self, "config"):  # update the config, which save_model writes
            self.config["arguments"] = self.config["arguments"] | {"num_classes": num_classes} | chosen
            if "data" in self.config:
                self.config["data"] = {k: value for k, value in self.config["data"].items() if k != "classes"}
        like = next(self.parameters())
        self.head.to(like.device, like.dtype)
        if num_classes:
            init_linear(self.head)

    def check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1:] != (self.in_chans, *self.img_size):
            expected = f"(batch, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) to normalized tokens (B, num_prefix_tokens + patches, num_features)."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Pool the tokens to one vector per image."""
        return x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens to logits (B, num_classes), or to the pooled features if `pre_logits` is True."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        """Return a dict from module names to ((rows, columns), number of prefix tokens).

        It has an entry for each module whose parameters may have a token dimension. The rows and columns are the size of the
        module's token map. The name "" refers to the whole model.
        """
        raise NotImplementedError


def grid_of(img_size: tuple[int, int], patch_size: Any) -> tuple[int, int]:
    """Return the rows and columns of the token map."""
    patch_size = pair("patch_size", patch_size)
    if any(size % patch for size, patch in zip(img_size, patch_size, strict=True)):
        raise ValueError(f"img_size: expected multiples of patch_size {patch_size}, got {img_size}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]
