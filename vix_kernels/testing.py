"""One specification an operator: its cases, its reference, its costs. Tests, benchmarks and users share them.

from vix_kernels.testing import SPECS
spec = SPECS["performer_attention"]
for case in spec.cases:
    problem = spec.problem(case, dtype=torch.bfloat16, device="cuda")
    out = problem(backend="triton")            # a tuple of outputs
    exact = problem.double()(reference=True)   # the same problem in float64, by the plain reference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .ops.linear import linear_attention, linear_attention_reference
from .ops.performer import orthogonal_projection, performer_attention, performer_attention_reference
from .ops.rope import apply_rope, apply_rope_reference, rope_1d, rope_mixed
from .primitives.aggregate import aggregate, aggregate_reference
from .primitives.broadcast import broadcast, broadcast_reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one problem. Small by default: Triton's interpreter runs them on a CPU."""

    name: str
    batch: int = 2
    heads: int = 2
    tokens: int = 37
    queries: int | None = None  # as many as tokens
    width: int = 16
    value_width: int | None = None  # the width of q
    features: int = 40
    masked: bool = False  # some keys, and all keys of the last sample; what is masked holds NaN and inf
    rope: str | None = None  # "interleaved" | "half"
    rotary: int | None = None  # rotated channels; all
    prefix: int = 0  # tokens in front that are not rotated
    per_head: bool = False  # a projection, or slots, for each head
    packed: bool = False  # q, k, v are views of one (batch, tokens, 3, heads, width) projection
    spread: float = 1.0  # standard deviation of q and k
    feature_map: str = "relu"  # of linear attention; "elu"
    eps: float = 0.125  # of linear attention: large enough to show, and exact in the float32 that kernels take it in


CASES = (
    Case("plain"),
    Case("packed", packed=True),
    Case("one_token", tokens=1),
    Case("one_feature", features=1, tokens=20),
    Case("narrowest", width=8, features=17, tokens=19),
    Case("odd_width", width=24, value_width=40),
    Case("narrow_values", width=40, value_width=8),
    Case("widest", batch=1, heads=1, width=256, tokens=18, features=18),
    Case("fewer_queries", queries=19),
    Case("more_queries", queries=53, tokens=20),
    Case("masked", masked=True),
    Case("sharp", spread=3.0),
    Case("per_head", per_head=True),
    Case("rope", rope="interleaved", packed=True),
    Case("rope_half", rope="half"),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True),
    Case("rope_odd_width", rope="interleaved", width=40, rotary=24, prefix=2),
)
LINEAR_CASES = (
    Case("plain"),
    Case("packed", packed=True, feature_map="elu"),
    Case("one_token", tokens=1, feature_map="elu", eps=0.0),
    Case("narrowest", width=8, tokens=19),
    Case("odd_width", width=24, value_width=40, feature_map="elu"),
    Case("narrow_values", width=40, value_width=8),
    Case("widest", batch=1, heads=1, width=256, tokens=18),
    Case("fewer_queries", queries=19, feature_map="elu"),
    Case("more_queries", queries=53, tokens=20),
    Case("masked", masked=True, feature_map="elu"),
    Case("masked_relu", masked=True),
    Case("rope", rope="interleaved", packed=True),
    Case("rope_half", rope="half", width=40, feature_map="elu"),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True, feature_map="elu"),
)
PROJECTED_CASES = (
    Case("plain"),
    Case("widest", batch=1, heads=1, width=256, tokens=18, features=18, feature_map="elu"),
    Case("masked", masked=True, feature_map="elu"),
    Case("per_head", per_head=True),
    Case("rope_half", rope="half"),
)
MIXED_CASES = (  # of learned angles: 4 rows of 9 tokens, 1 in front
    Case("rope", rope="interleaved", prefix=1),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True),
)


@dataclass(frozen=True)
class Problem:
    """Inputs of an operator. Calling it gives a tuple of outputs."""

    spec: OpSpec
    tensors: dict[str, Tensor]  # positional, in order
    options: dict[str, Any]

    def __call__(self, *, backend: str = "auto", reference: bool = False) -> tuple[Tensor, ...]:
        if reference:
            out = self.spec.reference(*self.tensors.values(), **self.options)
        else:
            out = self.spec.function(*self.tensors.values(), **self.options, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def double(self) -> Problem:
        """The same numbers in float64."""
        return self.map(lambda x: x.detach().double())

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, tensors={name: change(x) for name, x in self.tensors.items()})

    def sample(self, index: int) -> Problem:
        """One sample of the batch on its own."""
        size = self.tensors[self.spec.batched[0]].shape[0]

        def one(name: str, x: Any) -> Any:
            return x[index : index + 1] if name in self.spec.batched and x is not None and x.shape[0] == size else x

        tensors = {name: one(name, x) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, options={name: one(name, x) for name, x in self.options.items()})


@dataclass(frozen=True)
class OpSpec:
    """What tests and benchmarks need to know of an operator.

    Attributes:
        function: takes the tensors of a problem, its options and `backend`.
        reference: the same in plain PyTorch, without `backend`.
        build: (case, tensor) -> (tensors, options); tensor(*shape) draws a normal tensor of the problem's dtype.
        differentiable: names of the tensors that take gradients.
        batched: names of the tensors and options that have a batch dimension, the first of them always.
        cases: the problems every implementation must solve.
        flops: multiply-adds times two in the matrix products of a forward (in the rotation, for RoPE), each counted once.
        exps: exponentials of a forward.
        backward: flops of a backward over those of a forward. By default 2: of each two products of a move, backward makes
            the logits again and three gradients; those of random features, which nobody trains, are left out.

    Bytes and launches are counted, not declared: see _triton/costs.py.
    """

    name: str
    function: Callable
    reference: Callable
    build: Callable[[Case, Callable[..., Tensor]], tuple[dict[str, Tensor], dict[str, Any]]]
    differentiable: tuple[str, ...]
    batched: tuple[str, ...]
    cases: tuple[Case, ...]
    flops: Callable[[Case], int]
    exps: Callable[[Case], int] = lambda case: 0
    backward: float = 2.0

    def problem(
        self, case: Case, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> Problem:
        """The inputs of `case`: the same numbers for every dtype and device, rounded."""
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        tensors, options = self.build(case, tensor)
        return Problem(self, tensors, options)


def _qkv(case: Case, tensor: Callable[..., Tensor]) -> dict[str, Tensor]:
    queries, value_width = case.queries or case.tokens, case.value_width or case.width
    if case.packed:
        packed = tensor(case.batch, case.tokens, 3, case.heads, case.width, scale=case.spread)
        return dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True))
    return {
        "q": tensor(case.batch, case.heads, queries, case.width, scale=case.spread),
        "k": tensor(case.batch, case.heads, case.tokens, case.width, scale=case.spread),
        "v": tensor(case.batch, case.heads, case.tokens, value_width),
    }


def _mask(case: Case, k: Tensor, v: Tensor) -> Tensor | None:
    """A mask that leaves the last sample without keys; NaN and infinity lie under it."""
    if not case.masked:
        return None
    mask = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0], mask[-1] = True, False
    mask = mask.to(k.device)
    k.masked_fill_(~mask[:, None, :, None], float("nan"))
    v.masked_fill_(~mask[:, None, :, None], float("inf"))
    return mask


def _rope(case: Case, device: torch.device) -> Any:
    if case.rope is None:
        return None
    tokens = case.tokens - case.prefix
    return rope_1d(tokens, case.rotary or case.width, layout=case.rope, prefix_tokens=case.prefix, device=device)


def _tables(case: Case, device: torch.device) -> dict[str, Any]:
    rope = _rope(case, device)
    return {} if rope is None else dict(cos=rope.cos, sin=rope.sin, interleaved=rope.interleaved)


def _projection(case: Case, tokens: Tensor) -> Tensor:
    heads = case.heads if case.per_head else None
    projection = orthogonal_projection(case.features, case.width, seed=2, num_heads=heads)
    return projection.to(tokens.device, torch.promote_types(tokens.dtype, torch.float32))


def _scale(case: Case) -> float:
    """About width ** -0.5. Its root is exact in the float32 that kernels take it in, so that float64 runs are exact too."""
    return 0.25 if case.width < 64 else 0.0625


def _performer(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = _qkv(case, tensor)
    device = qkv["q"].device
    options = dict(scale=_scale(case), key_padding_mask=_mask(case, qkv["k"], qkv["v"]), rope=_rope(case, device))
    return qkv | {"projection": _projection(case, qkv["q"])}, options


def _linear(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = _qkv(case, tensor)
    mask, rope = _mask(case, qkv["k"], qkv["v"]), _rope(case, qkv["q"].device)
    return qkv, dict(feature_map=case.feature_map, eps=case.eps, key_padding_mask=mask, rope=rope)


def _linear_projected(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv, options = _linear(case, tensor)
    return qkv | {"projection": _projection(case, qkv["q"])}, options


def _aggregate(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = _qkv(case, tensor)
    k, v = qkv["k"], qkv["v"]
    slots = _slots(case, tensor, k)
    options = dict(scale=_scale(case) ** 0.5, gaussian=not case.per_head, mask=_mask(case, k, v), **_tables(case, k.device))
    return {"slots": slots, "k": k, "v": v}, options


def _broadcast(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    q = _qkv(case, tensor)["q"]
    wide = torch.promote_types(q.dtype, torch.float32)
    slots = _slots(case, tensor, q)
    values = tensor(case.batch, case.heads, case.features, case.value_width or case.width, dtype=wide)
    bias = tensor(case.batch, case.heads, case.features, dtype=wide)
    if case.masked:  # slots that no key has reached
        bias[:, :, ::3] = float("-inf")
        bias[-1] = float("-inf")
    return {"q": q, "slots": slots, "values": values, "slot_bias": bias}, dict(
        scale=_scale(case) ** 0.5, **_tables(case, q.device)
    )


def _slots(case: Case, tensor: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """Pooled slots have the tokens' dtype, random features are float32."""
    if case.per_head:
        return tensor(case.batch, case.heads, case.features, case.width)
    return _projection(case, tokens)[None, None]


def _apply_rope(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = _qkv(case, tensor)
    return {"q": qkv["q"], "k": qkv["k"]}, dict(rope=_rope(case, qkv["q"].device))


def _with_frequencies(build: Callable) -> Callable:
    """The problems of `build`, their tokens on a grid behind `prefix` others, with learned angles."""

    def mixed(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, options = build(replace(case, rope=None), tensor)
        wide = torch.promote_types(tensors["q"].dtype, torch.float32)
        tensors["frequencies"] = tensor(2, case.heads, (case.rotary or case.width) // 2, dtype=wide, scale=0.3)
        del options["rope"]
        return tensors, options | dict(rows=4, layout=case.rope or "interleaved", prefix=case.prefix)

    return mixed


def _mixed(function: Callable) -> Callable:
    """`function` of its tensors and, last, the frequencies of rope_mixed."""

    def mixed(q: Tensor, *tensors: Tensor, rows: int, layout: str, prefix: int, **options: Any) -> Any:
        *tensors, frequencies = tensors
        columns = (q.shape[2] - prefix) // rows  # what the grid leaves over stands in front of it too
        rope = rope_mixed(rows, columns, frequencies, layout=layout, prefix_tokens=q.shape[2] - rows * columns)
        return function(q, *tensors, rope=rope, **options)

    return mixed


def _aggregate_exps(case: Case) -> int:
    return case.batch * case.heads * case.tokens * case.features


def _broadcast_exps(case: Case) -> int:
    return case.batch * case.heads * (case.queries or case.tokens) * case.features


def _aggregate_flops(case: Case) -> int:
    return 2 * _aggregate_exps(case) * (case.width + (case.value_width or case.width))


def _broadcast_flops(case: Case) -> int:
    return 2 * _broadcast_exps(case) * (case.width + (case.value_width or case.width))


def _channels(case: Case) -> int:
    """Of queries and keys."""
    return case.batch * case.heads * (case.tokens + (case.queries or case.tokens)) * case.width


_PERFORMER = OpSpec(
    name="performer_attention",
    function=performer_attention,
    reference=performer_attention_reference,
    build=_performer,
    differentiable=("q", "k", "v", "projection"),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=CASES,
    flops=lambda case: _aggregate_flops(case) + _broadcast_flops(case),
    exps=lambda case: _aggregate_exps(case) + _broadcast_exps(case),
)
_LINEAR = OpSpec(
    name="linear_attention",
    function=linear_attention,
    reference=linear_attention_reference,
    build=_linear,
    differentiable=("q", "k", "v"),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=LINEAR_CASES,
    flops=lambda case: 2 * _channels(case) * (case.value_width or case.width),
    exps=lambda case: _channels(case) * (case.feature_map == "elu"),
)
_ROPE = OpSpec(
    name="apply_rope",
    function=apply_rope,
    reference=apply_rope_reference,
    build=_apply_rope,
    differentiable=("q", "k"),
    batched=("q", "k"),
    cases=tuple(case for case in CASES if case.rope and not case.masked)
    + (Case("rope_partial", rope="half", rotary=8, prefix=1, width=24),),
    flops=lambda case: 6 * case.batch * case.heads * case.tokens * (case.rotary or case.width),
    backward=1.0,
)
SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        _PERFORMER,
        _LINEAR,
        OpSpec(
            name="linear_attention_projected",
            function=lambda q, k, v, projection, **options: linear_attention(q, k, v, projection=projection, **options),
            reference=lambda q, k, v, projection, **options: linear_attention_reference(
                q, k, v, projection=projection, **options
            ),
            build=_linear_projected,
            differentiable=("q", "k", "v", "projection"),
            batched=("q", "k", "v", "key_padding_mask"),
            cases=PROJECTED_CASES,
            flops=lambda case: _aggregate_flops(case) + _broadcast_flops(case),
            exps=lambda case: (_aggregate_exps(case) + _broadcast_exps(case)) * (case.feature_map == "elu"),
        ),
        OpSpec(
            name="aggregate",
            function=aggregate,
            reference=aggregate_reference,
            build=_aggregate,
            differentiable=("slots", "k", "v"),
            batched=("k", "v", "slots", "mask"),
            cases=tuple(case for case in CASES if case.queries is None),
            flops=_aggregate_flops,
            exps=_aggregate_exps,
        ),
        OpSpec(
            name="broadcast",
            function=broadcast,
            reference=broadcast_reference,
            build=_broadcast,
            differentiable=("q", "slots", "values", "slot_bias"),
            batched=("q", "slots", "values", "slot_bias"),
            cases=tuple(case for case in CASES if case.queries is None),
            flops=_broadcast_flops,
            exps=_broadcast_exps,
        ),
        _ROPE,
        *(
            replace(
                spec,
                name=f"{spec.name}_mixed",
                function=_mixed(spec.function),
                reference=_mixed(spec.reference),
                build=_with_frequencies(spec.build),
                differentiable=(*spec.differentiable, "frequencies"),
                cases=tuple(case for case in MIXED_CASES if "key_padding_mask" in spec.batched or not case.masked),
            )
            for spec in (_PERFORMER, _LINEAR, _ROPE)
        ),
    )
}


def kept_for_backward(function: Callable, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps for the backward of function(*inputs) and that are neither input, output nor parameter."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    for x in (*inputs, *outputs):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())
