"""Cores: what one attention is, apart from where it stands.

A core is a frozen dataclass of the options of one attention. It declares the state that it needs, and attends. A shell is
whatever holds one: the timm-style module of nn/module.py, a model of the zoo. Shells take any core and know none by name, so
that a registered one is everywhere:

    @register("efficient")
    @dataclass(frozen=True)
    class Efficient(Core):
        \"\"\"softmax(q) (softmax(k)^T v), arXiv 1812.01243.\"\"\"

        def attend(self, module, q, k, v, *, scale, rope, tokens, sdpa, backend):
            return efficient_attention(q, k, v, key_padding_mask=tokens.key_padding_mask, rope=rope, backend=backend)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..ops.rope import Rope

Some = TypeVar("Some", bound="Mixer")


@dataclass(frozen=True)
class Tokens:
    """What a call knows of its tokens.

    Attributes:
        key_padding_mask: bool (batch, tokens), True = the token takes part.
        cu_seqlens: int32 (samples + 1), where each of the samples begins that are packed into one row. No core accepts it yet.
        group: the process group that the tokens are spread over. No core accepts it yet.
        grid_size, prefix_tokens: of this call, where they are not those of the site.
        self_attention: queries and keys are the same tokens.
    """

    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    grid_size: tuple[int, int] | None = None
    prefix_tokens: int | None = None
    group: Any = None
    self_attention: bool = True


@dataclass(frozen=True)
class SdpaArgs:
    """What only attention that forms its weights can take."""

    attn_mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False


@dataclass(frozen=True)
class Site:
    """Where a core is mounted."""

    head_dim: int
    num_heads: int
    layer: int = 0
    grid_size: tuple[int, int] | None = None
    prefix_tokens: int = 0
    num_tokens: int | None = None


@dataclass(frozen=True)
class Buffer:
    """A declared buffer. With keep_dtype it is moved, but not cast, with its module."""

    value: Tensor
    keep_dtype: bool = False


State = dict[str, nn.Parameter | Buffer | nn.Module | None]


class Mixer:
    """What mixes tokens. The subclasses are frozen dataclasses of their options, which all have defaults.

    Attributes:
        name: it is registered by.
        prefix_tokens, grid_size: where its slots are, of a mixer that has slots of tokens.
        presets: options whose default differs in the "zoo", or in a "host" whose attention it replaces.
        sited: options that follow from the site, so that a model of the zoo does not take them.
        has_extra_state: its modules have what extra_state and load_extra_state speak of.
        for_hosts: a host can have it in place of softmax attention.
        not_for_hosts: why not, to end a sentence with.
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
        """With these options and the defaults of a preset."""
        return cls(**cls.presets.get(preset, {}) | options)

    @classmethod
    def options(cls) -> list[str]:
        return [each.name for each in fields(cls)]

    def accepts(self) -> frozenset[str]:
        """Which of rope, key_padding_mask, attn_mask, dropout, causal, cross, cu_seqlens and group it takes."""
        return frozenset({"rope", "key_padding_mask"})

    def reason(self, argument: str) -> str:
        """Why it does not take `argument`, to end a sentence with."""
        return {
            "attn_mask": "use key_padding_mask (batch, tokens)",
            "dropout": "there are no weights to drop",
            "causal": "causal attention is not supported",
        }.get(argument, f"{self.name} attention does not support it")

    def refuse(self, **given: Any) -> None:
        """Raises NotImplementedError for the first of the arguments `given` that it does not accept."""
        for name, value in given.items():
            if value is not None and name not in self.accepts():
                what = {"rope": "a rotary embedding", "cu_seqlens": "packed samples", "group": "a process group"}.get(
                    name, "a mask"
                )
                raise NotImplementedError(f"{name}: expected None, got {what}; {self.reason(name)}")

    def fit(self: Some, site: Site) -> Some:
        """This mixer with what follows from its site: its slots on the grid, its layer's seed."""
        return self

    def in_layer(self: Some, layer: int) -> Some:
        """This mixer for one of several layers: those with random features should not share them."""
        return self

    def on_grid(self: Some, size: tuple[int, int]) -> Some:
        """This mixer with its slots on a grid of tokens (rows, columns), as many as fit it, if it has slots of tokens."""
        return self

    def describe(self) -> str:
        """What it is, in words, for a report."""
        options = ", ".join(f"{name} {getattr(self, name)}" for name in self.options())
        return f"{self.name}{', ' if options else ''}{options}"

    def state(self, site: Site) -> State:
        """What a module that holds it has: parameters, buffers, modules, or None for one that these options leave out."""
        return {}

    def redraw(self, module: nn.Module) -> None:
        """Draw what is random anew, if anything is."""

    def extra_state(self, module: nn.Module) -> Tensor:
        raise NotImplementedError

    def load_extra_state(self, module: nn.Module, extra: Any) -> None:
        raise NotImplementedError

    def mix(
        self, module: nn.Module, x: Tensor, *, num_heads: int, rope: Rope | None, tokens: Tokens, backend: str
    ) -> Tensor:  # fmt: skip
        """Of one that has no q, k and v: (batch, tokens, dim) to the same."""
        raise NotImplementedError


class Core(Mixer):
    """An attention: a mixer of q, k and v."""

    for_hosts = True

    def takes_trained_weights(self) -> bool:
        """Whether it is near enough to softmax attention to go on with weights that were trained with that."""
        return False

    def needs_module(self) -> bool:
        """Whether its state is trained, so that a module has to hold it."""
        return type(self).state is not Mixer.state

    def derived(self, q: Tensor) -> Any:
        """What stands for the module where it needs none, for a call with q: an object with the state that is derived."""
        return None

    def weights_only(self: Some) -> Some:
        """Without what is added to the attention: a residual is no attention."""
        return self

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        """(batch, heads, tokens, head_dim) to the same; `module` holds the state. scale: default head_dim ** -0.5."""
        raise NotImplementedError

    def attend_tokens(
        self, module: nn.Module, x: Tensor, maps: nn.Linear, *, scale: float, rope: Rope | None, tokens: Tokens, backend: str
    ) -> Tensor | None:
        """Attention of the tokens x (batch, tokens, dim) behind the packed maps to q, k and v, where that takes a better
        way than through all three: (batch, heads, tokens, head_dim); None where it does not."""
        return None


class Mounted(nn.Module):
    """A module that holds the state of a mixer."""

    kept_dtypes: tuple[str, ...] = ()

    def mount(self, mixer: Mixer, site: Site) -> None:
        """Register the state that `mixer` declares."""
        kept = []
        for name, value in mixer.state(site).items():
            if isinstance(value, Buffer):
                self.register_buffer(name, value.value)
                kept += [name] * value.keep_dtype
            else:
                setattr(self, name, value)
        self.kept_dtypes = tuple(kept)

    def _apply(self, fn: Any, recurse: bool = True) -> Mounted:
        before = {name: getattr(self, name) for name in self.kept_dtypes}
        super()._apply(fn, recurse)
        # Rounded features would differ between ranks and lose the estimate: move them, do not cast them.
        for name, value in before.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self


CORES: dict[str, type[Mixer]] = {}
_subscribers: list[Callable[[type[Mixer]], None]] = []


def register(name: str) -> Callable[[type[Some]], type[Some]]:
    """Make a mixer known by `name` to everything that takes names.

    Raises:
        ValueError: another one has this name.
    """

    def decorate(mixer: type[Some]) -> type[Some]:
        if name in CORES and CORES[name].__qualname__ != mixer.__qualname__:
            raise ValueError(f"name: expected one that is free, got {name!r}, that of {CORES[name].__qualname__}")
        mixer.name, CORES[name] = name, mixer
        for callback in _subscribers:
            callback(mixer)
        return mixer

    return decorate


def subscribe(callback: Callable[[type[Mixer]], None]) -> None:
    """Call `callback` with every mixer that is registered, those of later on included."""
    _subscribers.append(callback)
    for mixer in CORES.values():
        callback(mixer)
