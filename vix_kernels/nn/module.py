"""Timm-style modules that contain a core (see core.py). They map x (batch, tokens, dim) to a tensor of the same shape."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from .. import backends
from ..ops.checks import check_mask
from ..ops.rope import Rope
from ..ops.weights import attention_weights
from .checks import check_call_grid, check_heads, check_rate, check_tokens
from .core import Core, Mixer, Mounted, SdpaArgs, Site, Tokens
from .dropout import Dropout
from .packed_linear import packed_linear


class MixerModule(Mounted):
    """Base class for attention modules and other modules that contain a mixer.

    Subclasses create their parameters and then call `mount` to register the mixer's state.

    Attributes:
        core: the mixer, adapted to `site`.
        site: the Site of the module. By default, only the number and width of the heads are set.
    """

    def __init__(
        self, core: Mixer, dim: int, num_heads: int, attn_drop: float, proj_drop: float, backend: str, site: Site | None
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_rate("attn_drop", attn_drop)
        check_rate("proj_drop", proj_drop)
        if attn_drop and "dropout" not in core.accepts():
            raise NotImplementedError(f"attn_drop: expected 0 ({core.reason('dropout')}), got {attn_drop}")
        backends.check(backend)
        self.site = site or Site(dim // num_heads, num_heads)
        self.core = core.fit(self.site).with_prefix(self.site.prefix_tokens)
        self.dim, self.num_heads, self.head_dim, self.backend = dim, num_heads, dim // num_heads, backend

    def core_on(self, grid_size: tuple[int, int], tokens: int) -> Mixer:
        """Return the core for a call with `tokens` tokens, including the prefix, on a grid of `grid_size`."""
        check_call_grid(grid_size, tokens, self.core.known_prefix())
        return self.core if self.core.grid_size is None else self.core.on_grid(grid_size)

    def refuse(self, attn_mask: Tensor | None, is_causal: bool, rope: Rope | None, tokens: Tokens) -> None:
        """Raise NotImplementedError if the core does not support one of the given arguments."""
        self.core.refuse(
            rope=rope, attn_mask=attn_mask, key_padding_mask=tokens.key_padding_mask, cu_seqlens=tokens.cu_seqlens,
            group=tokens.group,
        )  # fmt: skip
        if is_causal and "causal" not in self.core.accepts():
            raise NotImplementedError(f"is_causal: expected False; {self.core.reason('causal')}")

    def extra_repr(self) -> str:
        return repr(self.core)


class AttentionModule(MixerModule):
    """Multi-head attention with any core (see nn/core.py) and the linear layers of timm's `Attention`.

    The parameters and the arguments from `dim` to `norm_layer` are named as in timm. timm's `Attention` has additional
    arguments in between, so pass the arguments after `num_heads` by keyword.

    Args:
        core: an instance of a Core subclass, which computes the attention.
        dim: width of the tokens; num_heads must divide it.
        num_heads: number of heads.
        qkv_bias, proj_bias: whether the two linear layers have a bias.
        qk_norm: whether to normalize q and k of each head with norm_layer(head_dim).
        attn_drop, proj_drop: dropout rates for the attention weights and for the output. Linear-cost cores do not compute
            attention weights, so they require attn_drop=0.
        norm_layer: the class of the normalization layers if qk_norm is set. Defaults to torch.nn.LayerNorm.
        backend: backend of the attention and of the rotary embedding.
        site: the Site of the module (see nn/core.py). By default, only the number and width of the heads are set.
    """

    core: Core

    def __init__(
        self,
        core: Core,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        *,
        backend: str = "auto",
        site: Site | None = None,
    ) -> None:
        super().__init__(core, dim, num_heads, attn_drop, proj_drop, backend, site)
        norm_layer = norm_layer or nn.LayerNorm
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = Dropout(proj_drop)
        self.mount(self.core, self.site)

    @property
    def has_weights(self) -> bool:
        """Whether the core has explicit attention weights, which can be masked or dropped."""
        return "attn_mask" in self.core.accepts()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        rope: Rope | None = None,
        cu_seqlens: Tensor | None = None,
        group: Any | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Apply attention to x, and return a tensor of the same shape.

        Args:
            x: (batch, tokens, dim).
            attn_mask: (tokens, tokens), with optional leading dimensions. A bool mask is True where a query may attend to a
                key. A float mask is added to the logits. Linear-cost cores do not support attn_mask, because they do not
                compute logits for pairs of tokens.
            is_causal: must be False unless the core supports causal attention. No core of this library does.
            key_padding_mask: bool (batch, tokens), True = valid. Padded tokens of x are read as 0.
            rope: rotary embedding of q and k.
            cu_seqlens, group: start offsets of packed samples, and the process group across which the tokens are sharded.
                Neither is supported yet.
            grid_size: (rows, columns) of the grid that the tokens after the prefix form in this call. If landmarks or agents
                are placed on a grid, this grid is used instead of the core's. For other cores, this argument is only checked.
        """
        check_tokens(x, self.dim, self.qkv)
        if key_padding_mask is not None:
            check_mask(key_padding_mask, x[:, None], columns="tokens")
            x = x.masked_fill(~key_padding_mask[..., None], 0)
        tokens = Tokens(key_padding_mask, cu_seqlens, grid_size, group=group)
        self.refuse(attn_mask, is_causal, rope, tokens)
        core = self.core if grid_size is None else self.core_on(grid_size, x.shape[1])
        out, normalized = None, not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        if attn_mask is None and not is_causal and not normalized:
            out = core.attend_tokens(self, x, self.qkv, scale=self.scale, rope=rope, tokens=tokens, backend=self.backend)
        if out is None:
            out = self._attend(core, *self.heads(x), tokens, rope, attn_mask, is_causal)
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of x (batch, tokens, dim), each (batch, heads, tokens, head_dim)."""
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in packed_linear(self.qkv, x))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _attend(
        self, core: Core, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, rope: Rope | None,
        attn_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        sdpa = SdpaArgs(attn_mask, self.attn_drop.p if self.training else 0.0, is_causal)
        return core.attend(self, q, k, v, scale=self.scale, rope=rope, tokens=tokens, sdpa=sdpa, backend=self.backend)

    def attention_of(self, x: Tensor, token: int = 0, *, rope: Rope | None = None) -> Tensor:
        """Return the attention weights (batch, heads, tokens) of one token of x (batch, tokens, dim).

        The weights are the token's row of the attention matrix. Residual terms, such as the convolution of Nystrom attention,
        are not included.
        """
        q, k, _ = self.heads(x)
        core = self.core.weights_only()

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
            return self._attend(core, q, k, v, Tokens(mask), rope)

        return attention_weights(attend, q, k, None, rope, token=token)


class RedrawnAttentionModule(AttentionModule):
    """An attention module whose core draws random features. Its extra state is the number of redraws.

    Attributes:
        redraws: the number of calls to `redraw_projection`. It is a Python integer, because reading a tensor in every step
            would synchronize with the device.
    """

    redraws = 0

    def redraw_projection(self) -> None:
        """Draw new random features. Ranks that have called this method the same number of times have the same features.

        Do not call this method between a forward pass and its backward pass, because activation checkpointing would recompute
        the forward pass with the new features. A captured CUDA graph uses the new features.
        """
        self.core.redraw(self)

    def get_extra_state(self) -> Tensor:
        return self.core.extra_state(self)

    def set_extra_state(self, state: Any) -> None:
        self.core.load_extra_state(self, state)


class MixingModule(MixerModule):
    """A module for mixers without q, k and v, used in place of an attention module. It has no linear layers.

    Args:
        core: the mixer.
        dim: width of the tokens; num_heads must divide it.
        num_heads: number of heads. Used only for the rotary embedding.
        attn_drop: must be 0.
        proj_drop: dropout rate of the output.
        backend: backend of the mixer.
        site: the Site of the module (see nn/core.py). By default, only the number and width of the heads are set.

    The other arguments are accepted for compatibility with timm's blocks, but have no effect.
    """

    def __init__(
        self,
        core: Mixer,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        *,
        backend: str = "auto",
        site: Site | None = None,
    ) -> None:
        super().__init__(core, dim, num_heads, attn_drop, proj_drop, backend, site)
        self.proj_drop = Dropout(proj_drop)
        self.mount(self.core, self.site)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        rope: Rope | None = None,
        cu_seqlens: Tensor | None = None,
        group: Any | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Apply the mixer to x, and return a tensor of the same shape.

        Args:
            x: (batch, tokens, dim).
            rope: rotary embedding. Because there are no queries and keys, x is split into heads and then rotated.

        For the other arguments, see AttentionModule.forward.
        """
        check_tokens(x, self.dim)
        tokens = Tokens(key_padding_mask, cu_seqlens, grid_size, group=group)
        self.refuse(attn_mask, is_causal, rope, tokens)
        core = self.core if grid_size is None else self.core_on(grid_size, x.shape[1])
        out = core.mix(self, x, num_heads=self.num_heads, rope=rope, tokens=tokens, backend=self.backend)
        return self.proj_drop(out)


def make_module(core: Mixer, dim: int, **options: Any) -> MixerModule:
    """Create a module for `core`. `options` are arguments of AttentionModule."""
    if not isinstance(core, Core):
        return MixingModule(core, dim, **options)
    return (RedrawnAttentionModule if core.has_extra_state else AttentionModule)(core, dim, **options)
