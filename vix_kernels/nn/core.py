"""Cores: attention methods, independent of the modules that use them.

A core is a frozen dataclass with the options of one attention method. It declares the state of the method, such as parameters,
and computes the attention. The modules that contain a core include the timm-style module in nn/module.py and the attention
layers of the models in models/ (the "zoo"). These modules accept any core without referring to it by name, so they also support
new cores. For example, this code adds a core:

    @register("efficient")
    @dataclass(frozen=True)
    class Efficient(Core):
        \"\"\"softmax(q) (softmax(k)^T v), arXiv 1812.01243.\"\"\"

        def attend(self, module, q, k, v, *, scale, rope, tokens, sdpa, backend):
            return efficient_attention(q, k, v, key_padding_mask=tokens.key_padding_mask, rope=rope, backend=backend)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..ops.checks import check_integer
from ..ops.rope import Rope

Some = TypeVar("Some", bound="Mixer")


@dataclass(frozen=True)
class Tokens:
    """Masks and layout of the tokens in one call.

    Attributes:
        key_padding_mask: bool (batch, tokens), True = valid.
        cu_seqlens: int32 (samples + 1), start offsets of samples that are packed into one row. Not supported by any core yet.
        group: process group across which the tokens are sharded. Not supported by any core yet.
        grid_size, prefix_tokens: layout of the tokens in this call, if it differs from the layout in the module's Site.
        self_attention: whether queries and keys come from the same tokens.
    """

    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    grid_size: tuple[int, int] | None = None
    prefix_tokens: int | None = None
    group: Any = None
    self_attention: bool = True


@dataclass(frozen=True)
class SdpaArgs:
    """Mask, dropout probability and causal flag, as in F.scaled_dot_product_attention."""

    attn_mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False


@dataclass(frozen=True)
class Site:
    """Properties of the layer that uses a core: its heads, its index in the model, and the layout of the model's tokens."""

    head_dim: int
    num_heads: int
    layer: int = 0
    grid_size: tuple[int, int] | None = None
    prefix_tokens: int = 0
    num_tokens: int | None = None


@dataclass(frozen=True)
class Buffer:
    """A buffer that a core declares. If keep_dtype is set, the buffer moves between devices but is never cast."""

    value: Tensor
    keep_dtype: bool = False


State = dict[str, nn.Parameter | Buffer | nn.Module | None]


class Mixer:
    """Base class for token mixers. Subclasses are frozen dataclasses whose fields are options with defaults.

    Attributes:
        name: the name under which the mixer is registered.
        prefix_tokens, grid_size: placement of the slots (landmarks or agents), for mixers that pool tokens into slots.
        presets: overrides of the field defaults. The key "zoo" is for models in models/, and the key "host" is for host models,
            whose softmax attention is replaced.
        sited: names of options whose values come from the Site. Models in models/ do not accept these options.
        has_extra_state: whether modules with this mixer have extra state (see extra_state, load_extra_state).
        for_hosts: whether this mixer can replace softmax attention in a host model.
        not_for_hosts: the reason why for_hosts is False, phrased as the end of an error message.
    """

    name: ClassVar[str]
    prefix_tokens: int = 0
    grid_size: tuple[int, int] | None = None
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    sited: ClassVar[frozenset[str]] = frozenset()
    has_extra_state: ClassVar[bool] = False
    for_hosts: ClassVar[bool] = False
    not_for_hosts: ClassVar[str] = ""

    @classmethod
    def made(cls: type[Some], preset: str, **options: Any) -> Some:
        """Create a mixer with the options of a preset, overridden by `options`."""
        return cls(**cls.presets.get(preset, {}) | options)

    @classmethod
    def options(cls) -> list[str]:
        return [each.name for each in sorted(fields(cls), key=lambda each: each.kw_only)]

    def known_prefix(self) -> int | None:
        """Return `prefix_tokens`, or None if the mixer does not have this option."""
        return self.prefix_tokens if "prefix_tokens" in self.sited else None

    def accepts(self) -> frozenset[str]:
        """Return the names of the supported arguments.

        The names are a subset of rope, key_padding_mask, attn_mask, dropout, causal, cross, cu_seqlens and group.
        """
        return frozenset({"rope", "key_padding_mask"})

    def reason(self, argument: str) -> str:
        """Return why `argument` is not supported, phrased as the end of an error message."""
        return {
            "attn_mask": "use key_padding_mask (batch, tokens)",
            "dropout": "there are no attention weights to drop",
            "causal": "causal attention is not supported",
        }.get(argument, f"{self.name} attention does not support it")

    def refuse(self, **given: Any) -> None:
        """Raise NotImplementedError for the first argument in `given` that is not None and not supported."""
        for name, value in given.items():
            if value is not None and name not in self.accepts():
                what = {"rope": "a rotary embedding", "cu_seqlens": "packed samples", "group": "a process group"}.get(
                    name, "a mask"
                )
                raise NotImplementedError(f"{name}: expected None, got {what}; {self.reason(name)}")

    def fit(self: Some, site: Site) -> Some:
        """Return this mixer adapted to `site`, for example with slots on the site's grid or a different seed for each layer."""
        return self

    def with_prefix(self: Some, prefix_tokens: int) -> Some:
        """Return this mixer adapted to a model with `prefix_tokens` class and register tokens."""
        return self

    def after_prefix(self: Some, prefix_tokens: int) -> Some:
        """Return this mixer with its slots pooled from the tokens after a prefix of `prefix_tokens` tokens.

        Each token of the prefix is a separate slot. Mixers that do not pool tokens into slots are returned unchanged.
        """
        return self

    def in_layer(self: Some, layer: int) -> Some:
        """Return this mixer adapted to the layer with index `layer`, for example with a different seed."""
        return self

    def on_grid(self: Some, size: tuple[int, int]) -> Some:
        """Return this mixer with its slots placed on a token grid of `size` (rows, columns).

        The number of slots may decrease. Mixers that do not pool tokens into slots are returned unchanged.
        """
        return self

    def describe(self) -> str:
        """Return the mixer's name and options as text, for reports."""
        options = ", ".join(f"{name} {getattr(self, name)}" for name in self.options())
        return f"{self.name}{', ' if options else ''}{options}"

    def state(self, site: Site) -> State:
        """Return the parameters, buffers and submodules to register in a module, by name. Unused entries are None."""
        return {}

    def redraw(self, module: nn.Module) -> None:
        """Draw new random features, if the mixer has any."""

    def extra_state(self, module: nn.Module) -> Tensor:
        raise NotImplementedError

    def load_extra_state(self, module: nn.Module, extra: Any) -> None:
        raise NotImplementedError

    def mix(
        self, module: nn.Module, x: Tensor, *, num_heads: int, rope: Rope | None, tokens: Tokens, backend: str
    ) -> Tensor:  # fmt: skip
        """Return x (batch, tokens, dim) with its tokens mixed. The result has the same shape.

        Mixers with q, k and v do not implement this method.
        """
        raise NotImplementedError


class Core(Mixer):
    """Base class for attention methods, which are mixers with q, k and v."""

    for_hosts = True

    def takes_trained_weights(self) -> bool:
        """Return whether this core approximates softmax attention well enough to use weights trained with softmax attention."""
        return False

    def needs_module(self) -> bool:
        """Return whether this core needs state, such as parameters, that must be registered in a module."""
        return type(self).state is not Mixer.state

    def derived(self, q: Tensor) -> Any:
        """Return an object that `attend` accepts in place of `module` if needs_module() is False.

        Its attributes are the state that `attend` needs, such as random features for q's head width. The result is None if
        `attend` needs no state.
        """
        return None

    def exact_rows(self, tokens: Tokens) -> int:
        """Return the number of leading queries that use exact softmax attention.

        Returns 0 unless queries and keys come from the same tokens.
        """
        return 0

    def weights_only(self: Some) -> Some:
        """Return this core without residual terms, which are not part of the attention weights."""
        return self

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        """Return the attention output for q, k and v. Inputs and output have the shape (batch, heads, tokens, head_dim).

        `module` has the state of the core as attributes. The default scale is head_dim ** -0.5.
        """
        raise NotImplementedError

    def attend_tokens(
        self, module: nn.Module, x: Tensor, maps: nn.Linear, *, scale: float, rope: Rope | None, tokens: Tokens, backend: str
    ) -> Tensor | None:
        """Return the attention output for x (batch, tokens, dim). `maps` is the packed linear layer for q, k and v.

        Cores implement this method only if it is faster than computing q, k and v first. The result is (batch, heads, tokens,
        head_dim), or None if the caller should compute q, k and v and call `attend`.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class PrefixCore(Core):
    """Base class of cores that can use exact softmax attention for the first tokens (see ops/exact.py).

    Attributes:
        exact_prefix: number of leading tokens that use exact softmax attention. True means all class and register tokens of the
            model, or none if their number is unknown. Defaults to True in host models, and to False elsewhere.
    """

    exact_prefix: bool | int = False

    presets = {"host": {"exact_prefix": True}}

    def __post_init__(self) -> None:
        if not isinstance(self.exact_prefix, bool):
            check_integer("exact_prefix", self.exact_prefix, 0)

    def with_prefix(self: Some, prefix_tokens: int) -> Some:
        return replace(self, exact_prefix=prefix_tokens) if self.exact_prefix is True else self

    def exact_rows(self, tokens: Tokens) -> int:
        return 0 if isinstance(self.exact_prefix, bool) or not tokens.self_attention else self.exact_prefix

    def describe_prefix(self) -> str:
        count = self.exact_rows(Tokens())
        return f", {count} exact prefix token{'s' * (count > 1)}" if count else ""


class Mounted(nn.Module):
    """A module in which the state of a mixer is registered."""

    kept_dtypes: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()  # names of the parameters that the mixer declared

    def mount(self, mixer: Mixer, site: Site) -> None:
        """Register the state that `mixer` declares."""
        kept, state = [], mixer.state(site)
        for name, value in state.items():
            if isinstance(value, Buffer):
                self.register_buffer(name, value.value)
                kept += [name] * value.keep_dtype
            else:
                setattr(self, name, value)
        self.kept_dtypes = tuple(kept)
        self.learned = tuple(name for name, value in state.items() if isinstance(value, nn.Parameter))

    def learned_parameters(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in self.learned]

    def widen(self) -> None:
        """Cast the parameters named in `learned` to float32, the dtype in which they are trained."""
        for parameter in self.learned_parameters():
            parameter.data = parameter.data.float()

    def _apply(self, fn: Any, recurse: bool = True) -> Mounted:
        before = {name: getattr(self, name) for name in self.kept_dtypes}
        super()._apply(fn, recurse)
        # Move these buffers without casting them. Rounded random features would be less accurate.
        for name, value in before.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self


CORES: dict[str, type[Mixer]] = {}
_subscribers: list[Callable[[type[Mixer]], None]] = []


def register(name: str) -> Callable[[type[Some]], type[Some]]:
    """Return a class decorator that registers a mixer under `name`.

    Raises:
        ValueError: a different mixer is already registered under this name.
    """

    def decorate(mixer: type[Some]) -> type[Some]:
        if name in CORES and CORES[name].__qualname__ != mixer.__qualname__:
            raise ValueError(f"name: expected an unused name, got {name!r}, the name of {CORES[name].__qualname__}")
        mixer.name, CORES[name] = name, mixer
        for callback in _subscribers:
            callback(mixer)
        return mixer

    return decorate


def subscribe(callback: Callable[[type[Mixer]], None]) -> None:
    """Call `callback` with every mixer that is already registered, and with each mixer that is registered later."""
    _subscribers.append(callback)
    for mixer in CORES.values():
        callback(mixer)
