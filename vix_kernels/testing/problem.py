"""Problems: sizes and inputs of operators, and the specifications that tests and benchmarks read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.performer import orthogonal_projection
from ..ops.rope import rope_1d


@dataclass(frozen=True)
class Case:
    """Sizes and options of one problem. Defaults are small, because Triton's interpreter runs them on a CPU."""

    name: str
    batch: int = 2
    heads: int = 2
    tokens: int = 37
    queries: int | None = None  # None: `tokens`
    width: int = 16
    value_width: int | None = None  # None: `width`
    features: int = 40
    masked: bool = False  # masks some keys, and all keys of the last sample; masked tokens hold NaN and inf
    rope: str | None = None  # "interleaved" | "half"
    rotary: int | None = None  # rotated channels; None: all
    prefix: int = 0  # leading tokens that are not rotated
    per_head: bool = False  # separate projections or slots for each head
    packed: bool = False  # q, k, v are views of one (batch, tokens, 3, heads, width) projection
    spread: float = 1.0  # standard deviation of q and k
    feature_map: str = "relu"  # of linear attention: "relu" | "elu"
    taps: int = 3  # of a convolution over tokens
    rows: int = 1  # of the grid that the tokens after the prefix form
    mark_rows: int = 1  # rows of landmarks, with `features` in each
    adaptive: bool = False  # landmarks of overlapping windows
    learned: bool = False  # random features require gradients
    eps: float = 0.125  # of linear attention: large enough to change results, and exact in float32


@dataclass(frozen=True)
class Problem:
    """Inputs of an operator. Calling it returns a tuple of outputs."""

    spec: OpSpec
    tensors: dict[str, Tensor]  # positional, in order
    options: dict[str, Any]

    def __call__(self, *, backend: str = "auto", reference: bool = False) -> tuple[Tensor, ...]:
        if reference:
            out = self.spec.reference(*self.tensors.values(), **self.options)
        else:
            out = self.spec.function(*self.tensors.values(), **self.options, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def gradients(self, outputs: tuple[Tensor, ...], cotangents: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Return the gradients of the tensors that require them. By default the cotangents are uninitialized."""
        wanted = [x for x in self.tensors.values() if x.requires_grad]
        return torch.autograd.grad(outputs, wanted, cotangents or [torch.empty_like(x) for x in outputs])

    def double(self) -> Problem:
        """Return the same problem in float64."""
        return self.map(lambda x: x.detach().double())

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, tensors={name: change(x) for name, x in self.tensors.items()})

    def sample(self, index: int) -> Problem:
        """Return the problem of one sample of the batch."""
        size = self.tensors[self.spec.batched[0]].shape[0]

        def one(name: str, x: Any) -> Any:
            return x[index : index + 1] if name in self.spec.batched and x is not None and x.shape[0] == size else x

        tensors = {name: one(name, x) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, options={name: one(name, x) for name, x in self.options.items()})


@dataclass(frozen=True)
class OpSpec:
    """Specification of an operator for tests and benchmarks.

    Attributes:
        name: name of the operator.
        function: the operator. Called with the tensors of a problem, its options and `backend`.
        reference: the same in plain PyTorch, without `backend`.
        build: (case, tensor) -> (tensors, options). tensor(*shape) draws a normal tensor in the problem's dtype.
        differentiable: names of the tensors that get gradients.
        fixed: those that get no gradient in measurements, such as random features, unless the case is `learned`.
        batched: names of the tensors and options that have a batch dimension. The first one is always present.
        cases: problems that every implementation is tested on.
        flops: operations (two per multiply-add) in the matrix products of a forward, or in the rotation for RoPE.
        exps: exponentials of a forward.
        backward: flops of a backward as a multiple of the forward's. Default: 2. For every two products of a pass, backward
            computes the logits again and three gradients. Gradients of random features, which are rarely trained, do not count.
        rotates: whether every problem has angles.
        public: whether users call it. Public operators are benchmarked, their traffic is counted, and `vix check` lists them.
        compiled: cases that the compile report compiles at every head width. It sets batch, heads, tokens and width. A case
            without slots has 0 features. The case's name is appended to the operator's.
        variants: more cases that it compiles, at fewer widths.
        most_features: limit of the features in measurements. See `fit`.

    Bytes and launches are counted by measure/costs.py.
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
    rotates: bool = False
    public: bool = False
    compiled: tuple[Case, ...] = ()
    variants: tuple[Case, ...] = ()
    most_features: int | None = None
    fixed: tuple[str, ...] = ()

    @property
    def attends(self) -> bool:
        """Whether it is an attention of queries, keys and values."""
        return {"q", "k", "v"} <= set(self.differentiable)

    def fit(self, case: Case) -> Case:
        """Adapt `case` to measurements of this operator.

        Adds angles if every problem has them, removes the mask if no case is masked, and limits the features.
        """
        rope = case.rope or ("interleaved" if self.rotates else None)
        features = min(case.features, self.most_features or case.features)
        return replace(case, rope=rope, features=features, masked=case.masked and any(each.masked for each in self.cases))

    def problem(
        self, case: Case, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> Problem:
        """Draw the inputs of `case`: the same numbers for every dtype and device, up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        tensors, options = self.build(case, tensor)
        return Problem(self, tensors, options)


SPECS: dict[str, OpSpec] = {}
REGISTERING: set[str] = set()  # modules whose import fills SPECS; workers import them, too


def register(*specs: OpSpec) -> None:
    """Register operators for tests and measurements. Other packages may register operators, too.

    Raises:
        ValueError: another operator has one of the names.
    """
    for spec in specs:
        if spec.name in SPECS:
            raise ValueError(f"name: expected one that is free, got {spec.name!r}, that of another operator")
        SPECS[spec.name] = spec
    REGISTERING.add(sys._getframe(1).f_globals["__name__"])


def draw(spec: OpSpec, case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Draw the inputs of `case` on the device, which is faster than `spec.problem` for large sizes.

    Differentiable tensors require gradients. `fixed` ones do only if the case is `learned`.
    """

    def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        x = torch.empty(shape, device=device, dtype=dtype)
        return x if x.is_meta else x.normal_(0, scale)

    tensors, options = spec.build(case, tensor)
    trained = set(spec.differentiable) - (set() if case.learned else set(spec.fixed))
    return Problem(spec, {name: x.detach().requires_grad_(name in trained) for name, x in tensors.items()}, options)


# Helpers of `build` functions


def make_qkv(case: Case, tensor: Callable[..., Tensor]) -> dict[str, Tensor]:
    queries, value_width = case.queries or case.tokens, case.value_width or case.width
    if case.packed:
        packed = tensor(case.batch, case.tokens, 3, case.heads, case.width, scale=case.spread)
        return dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True))
    return {
        "q": tensor(case.batch, case.heads, queries, case.width, scale=case.spread),
        "k": tensor(case.batch, case.heads, case.tokens, case.width, scale=case.spread),
        "v": tensor(case.batch, case.heads, case.tokens, value_width),
    }


def make_mask(case: Case, k: Tensor, v: Tensor) -> Tensor | None:
    """Draw a mask that leaves the last sample without keys. Fill the masked tokens of k with NaN and those of v with inf."""
    if not case.masked:
        return None
    mask = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0], mask[-1] = True, False
    mask = mask.to(k.device)
    k.masked_fill_(~mask[:, None, :, None], float("nan"))
    v.masked_fill_(~mask[:, None, :, None], float("inf"))
    return mask


def make_rope(case: Case, device: torch.device) -> Any:
    if case.rope is None:
        return None
    tokens = case.tokens - case.prefix
    return rope_1d(tokens, case.rotary or case.width, layout=case.rope, prefix_tokens=case.prefix, device=device)


def make_tables(case: Case, device: torch.device) -> dict[str, Any]:
    rope = make_rope(case, device)
    return {} if rope is None else dict(rotary=rope.rotary)


def make_projection(case: Case, tokens: Tensor) -> Tensor:
    heads = case.heads if case.per_head else None
    projection = orthogonal_projection(case.features, case.width, seed=2, num_heads=heads)
    return projection.to(tokens.device, torch.promote_types(tokens.dtype, torch.float32))


def exact_scale(case: Case) -> float:
    """Return about width ** -0.5. Kernels receive it or its root in float32, which is exact, so float64 runs are exact."""
    return 0.25 if case.width < 64 else 0.0625


def aggregate_exps(case: Case) -> int:
    return case.batch * case.heads * case.tokens * case.features


def broadcast_exps(case: Case) -> int:
    return case.batch * case.heads * (case.queries or case.tokens) * case.features


def aggregate_flops(case: Case) -> int:
    return 2 * aggregate_exps(case) * (case.width + (case.value_width or case.width))


def broadcast_flops(case: Case) -> int:
    return 2 * broadcast_exps(case) * (case.width + (case.value_width or case.width))
