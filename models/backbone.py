"""Base class of the models that `create_model` builds. It provides the classification head and an interface like timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from vix_kernels.nn.dropout import Dropout

from .arguments import check_choice, check_counts, check_rates, pair
from .layers import init_linear


class Level(NamedTuple):
    """A point in a model where features can be extracted: the output of a block, or of a stage in models with stages."""

    module: str  # name of the block or stage
    width: int  # number of channels
    grid: tuple[int, int]  # height and width of the token map


class Backbone(nn.Module):
    """Base class of models that map images (B, in_chans, *img_size) to logits (B, num_classes).

    Models without stages apply `blocks` and then `norm` to the tokens. For models with stages, see `Pyramid`. A subclass
    implements `forward_trunk` and `token_maps`, and calls `finish` at the end of its constructor.
    """

    config: dict[str, Any]  # entries that `save_model` writes to config.json, such as the arguments of `create_model`
    trunk = "blocks"  # name of the ModuleList of blocks or stages
    # Supported values of global_pool: "token" = class token, "avg" = mean of the patch tokens, "max" = maximum of the patch
    # tokens, "seq" = mean with learned weights, "" = no pooling
    pools = ("avg", "max", "")
    embed_dim: int
    grid: tuple[int, int]
    blocks: nn.ModuleList
    norm: nn.Module

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
        """Enable or disable activation checkpointing, which saves only the inputs of the blocks for the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one. num_classes=0 removes the head. global_pool="" removes the pooling."""
        chosen = {} if global_pool is None else {"global_pool": global_pool}
        global_pool = self.global_pool if global_pool is None else global_pool
        check_choice(self.pools, global_pool=global_pool)
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError('global_pool: expected "avg", "max" or "" with class_token=False, got "token"')
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes: expected an integer >= 0, got {num_classes!r}")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if hasattr(self, "config"):  # update the config, which save_model writes
            self.config["arguments"] = self.config["arguments"] | {"num_classes": num_classes} | chosen
            if "data" in self.config:
                self.config["data"] = {k: value for k, value in self.config["data"].items() if k != "classes"}
        like = next(self.parameters())
        self.head.to(like.device, like.dtype).train(self.training)
        if num_classes:
            init_linear(self.head)

    @property
    def head_hidden_size(self) -> int:
        """The width of the features that the head receives."""
        return self.num_features

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Adapt the model to images of another size, in place.

        Resample the weights in the same way as `load_model(..., img_size=img_size)`. Replace only parameters whose shape
        depends on the image size. `patch_size` must be None.

        Raises:
            ValueError: an argument is invalid, `create_model` did not build this model, or a module other than
                the head has been replaced. The model is unchanged.
        """
        from .resize import resize  # not at the top, because it imports zoo.py, which imports this module

        if patch_size is not None:
            raise ValueError(f"patch_size: expected None, because the patch size of a model is fixed, got {patch_size!r}")
        if img_size is not None:
            resize(self, pair("img_size", img_size))

    def forward_trunk(self, x: Tensor, levels: int | None = None, outputs: list[Tensor] | None = None) -> Tensor:
        """Map images to the tokens (B, num_prefix_tokens + patches, width) after the first `levels` levels.

        If `levels` is None, all levels are computed. If `outputs` is a list, the tokens after each level are appended to it.
        """
        raise NotImplementedError

    def levels(self) -> list[Level]:
        """Return the levels of the model, from the first to the last."""
        return [Level(f"blocks.{layer}", self.embed_dim, self.grid) for layer in range(len(self.blocks))]

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) to normalized tokens (B, num_prefix_tokens + patches, num_features)."""
        check_images(x, self.in_chans, self.img_size)
        return self.norm(self.forward_trunk(x))

    def pool(self, x: Tensor) -> Tensor:
        """Pool the tokens into one vector per image, or return them unchanged if global_pool is ""."""
        if self.global_pool == "":
            return x
        if self.global_pool == "token":
            return x[:, 0]
        x = x[:, self.num_prefix_tokens :]
        return x.amax(dim=1) if self.global_pool == "max" else x.mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens to logits (B, num_classes), or to pooled features if `pre_logits` is True or num_classes is 0."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """A description of each level in timm's format: module name, number of channels, and stride in pixels."""
        return [
            dict(module=level.module, num_chs=level.width, reduction=round(self.img_size[0] / level.grid[0]))
            for level in self.levels()
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return (tokens, features): the result of `forward_features`, and a list of the features of the chosen levels.

        Args:
            indices: indices of levels in `feature_info`. An integer n selects the last n levels, and None selects all levels.
            return_prefix_tokens: return a pair (feature, prefix tokens) for each level if the model has prefix tokens.
            norm: apply the final norm to the features. In models with stages, the norm applies only to the last stage.
            stop_early: skip the levels after the last chosen level. The returned tokens then come from this level.
            output_fmt: "NCHW" for maps (B, C, rows, columns), "NLC" for tokens (B, rows * columns, C).
            intermediates_only: return only the features.
        """
        check_choice(("NCHW", "NLC"), output_fmt=output_fmt)
        check_images(x, self.in_chans, self.img_size)
        levels, chosen = self.levels(), self._indices(indices)
        outputs: list[Tensor] = []
        x = self.forward_trunk(x, max(chosen) + 1 if stop_early else None, outputs)
        features, prefix = [], self.num_prefix_tokens
        for index in sorted(set(chosen)):
            tokens = self.norm(outputs[index]) if norm and self._has_norm(index) else outputs[index]
            feature = tokens[:, prefix:]
            if output_fmt == "NCHW":
                feature = feature.mT.unflatten(2, levels[index].grid).contiguous()
            features.append((feature, tokens[:, :prefix]) if return_prefix_tokens and prefix else feature)
        if intermediates_only:
            return features
        return (self.norm(x) if self._has_norm(len(outputs) - 1) else x), features

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the features of the last `n` levels, or of the levels with the indices `n`, as in DINO models."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the levels after the last level that `indices` selects, in place.

        If prune_norm is True, also remove the final norm. If prune_head is True, also remove the head. `save_model` rejects a
        pruned model.

        Returns:
            The indices of the chosen levels, as integers >= 0.
        """
        chosen, levels = self._indices(indices), self.levels()
        kept = max(chosen) + 1
        if kept < len(levels) and not prune_head and not self._has_norm(kept - 1):
            raise ValueError("prune_head: expected True, because the head needs the last stage, got False")
        if prune_norm or not self._has_norm(kept - 1):
            self.norm = nn.Identity()
        setattr(self, self.trunk, getattr(self, self.trunk)[:kept])
        self.num_features = levels[kept - 1].width
        if prune_head:
            self.reset_classifier(0, "")
        self.__dict__.pop("config", None)  # create_model cannot build a pruned model
        return chosen

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(getattr(self, self.trunk))
        if indices is None:
            indices = count
        if isinstance(indices, int) and 0 < indices <= count:
            return list(range(count - indices, count))
        valid = isinstance(indices, Sequence) and indices and all(isinstance(i, int) and -count <= i < count for i in indices)
        if not valid:
            expected = f"a number of levels up to {count}, or indices from {-count} to {count - 1}"
            raise ValueError(f"indices: expected {expected}, got {indices!r}")
        return [index % count for index in indices]

    def _has_norm(self, index: int) -> bool:
        """Return whether the final norm can be applied to the level with this index."""
        return self.trunk == "blocks" or index == len(self.levels()) - 1

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns with which timm groups the parameters by depth, from the stem to the head.

        If `coarse` is True, each stage of a model with stages is one group.
        """
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm|^attention_pool", (99999,))]
        return dict(stem=r"^(?:cls_token|pos_embed|patch_embed|tokenizer|rope)", blocks=blocks)

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        """Return a dict from module names to ((height, width) of the token map, number of prefix tokens).

        The dict has an entry for each module whose parameters can have a token dimension. The name "" refers to the whole
        model.
        """
        raise NotImplementedError


@torch.fx.wrap  # torch.fx cannot trace conditions on the shape
def check_images(x: Tensor, in_chans: int, img_size: tuple[int, int]) -> None:
    if torch.jit.is_tracing():  # conditions on the shape of a traced tensor cause warnings
        return
    if x.ndim != 4 or x.shape[1:] != (in_chans, *img_size):
        raise ValueError(f"x: expected shape (batch, {in_chans}, {img_size[0]}, {img_size[1]}), got {tuple(x.shape)}")


def grid_of(img_size: tuple[int, int], patch_size: Any) -> tuple[int, int]:
    """Return the height and width of the token map."""
    patch_size = pair("patch_size", patch_size)
    if any(size % patch for size, patch in zip(img_size, patch_size, strict=True)):
        raise ValueError(f"img_size: expected multiples of patch_size {patch_size}, got {img_size}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]
