"""Operator specifications, and problems (operators with their inputs), for tests and benchmarks."""

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
    """Sizes and options of one problem. The defaults are small, because Triton's interpreter runs the problems on a CPU."""

    name: str
    batch: int = 2
    heads: int = 2
    tokens: int = 37
    queries: int | None = None  # number of queries; None means `tokens`
    width: int = 16
    value_width: int | None = None  # head width of the values; None means `width`
    features: int = 40  # number of slots (random features, landmarks, agents or projected keys)
    masked: bool = False  # whether to mask some keys, and all keys of the last sample; masked tokens contain NaN and inf
    rope: str | None = None  # "interleaved", "half" or None
    rotary: int | None = None  # number of rotated channels; None means all
    prefix: int = 0  # number of leading tokens that are neither rotated nor pooled
    per_head: bool = False  # whether each head has separate projections or slots
    packed: bool = False  # whether q, k and v are views of one tensor (batch, tokens, 3, heads, width)
    spread: float = 1.0  # standard deviation of q and k
    feature_map: str = "relu"  # feature map of linear attention: "relu" or "elu"
    taps: int = 3  # kernel size of the convolution over tokens
    rows: int = 1  # number of rows of the token grid, which starts after the prefix
    mark_rows: int = 1  # number of rows of landmarks; each row has `features` landmarks
    adaptive: bool = False  # whether landmarks use the windows of adaptive pooling, which may overlap
    learned: bool = False  # whether random features require gradients
    exact: int = 0  # number of leading queries with exact softmax attention
    eps: float = 0.125  # eps of linear attention; large enough to change results, and exact in float32


@dataclass(frozen=True)
class Problem:
    """An operator with its inputs. Calling a problem runs the operator and returns a tuple of outputs."""

    spec: OpSpec
    tensors: dict[str, Tensor]  # positional arguments, in order
    options: dict[str, Any]  # keyword arguments

    def __call__(self, *, backend: str = "auto", reference: bool = False) -> tuple[Tensor, ...]:
        if reference:
            out = self.spec.reference(*self.tensors.values(), **self.options)
        else:
            out = self.spec.function(*self.tensors.values(), **self.options, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def gradients(self, outputs: tuple[Tensor, ...], cotangents: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Return the gradients for the tensors that require gradients.

        Without `cotangents`, uninitialized tensors are used, and the values of the gradients are meaningless. This is enough to
        count, record or compile the kernels of the backward pass.
        """
        wanted = [x for x in self.tensors.values() if x.requires_grad]
        return torch.autograd.grad(outputs, wanted, cotangents or [torch.empty_like(x) for x in outputs])

    def double(self) -> Problem:
        """Return the same problem in float64."""
        return self.map(lambda x: x.detach().double())

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, tensors={name: change(x) for name, x in self.tensors.items()})

    def sample(self, index: int) -> Problem:
        """Return this problem with only one sample of the batch."""
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
        function: the operator. It is called with the tensors and options of a problem, and with `backend`.
        reference: the same operator in plain PyTorch. It is called without `backend`.
        build: function (case, tensor) -> (tensors, options). tensor(*shape) draws a tensor in the problem's dtype from a normal
            distribution.
        differentiable: names of the tensors that receive gradients.
        fixed: names of differentiable tensors, such as random features, that receive gradients in measurements only if the case
            sets `learned`.
        batched: names of the tensors and options that have a batch dimension. The first one is always present.
        cases: test cases. Every implementation is tested on all of them.
        flops: function that returns the number of operations (two per multiply-add) in the matrix products of a forward pass.
            For RoPE, it returns the number of operations in the rotation.
        exps: function that returns the number of exponentials in a forward pass.
        backward: FLOPs of the backward pass divided by FLOPs of the forward pass. The default is 2: for every two matrix
            products in the forward pass, the backward pass needs one to recompute the logits and three to compute gradients.
            Gradients of random features are not counted, because these features are rarely trained.
        rotates: whether every problem of the operator has rotary angles.
        public: whether the operator is part of the public API. Public operators are benchmarked, their memory traffic is
            counted, and `vix check` lists them.
        compiled: cases for `vix dev compile-report`. The report sets batch, heads, tokens and width. `features` is 0 in a case
            without slots. The name of the case is appended to the name of the operator. If the operator supports masks, the
            report adds a masked copy of the first case. If the operator computes attention and supports the "half" layout of
            the rotary embedding, the report adds a copy with this layout.
        variants: more cases for `vix dev compile-report`. The report adds no copies of them.
        most_features: maximum number of features in measurements. See `fit`.

    The memory traffic and the kernel launches of an operator are counted in measure/costs.py.
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
        """Whether the operator computes attention from queries, keys and values."""
        return {"q", "k", "v"} <= set(self.differentiable)

    def fit(self, case: Case) -> Case:
        """Return `case` adapted for measurements of this operator.

        If the operator requires rotary angles, they are added. If none of the operator's cases is masked, the mask is removed.
        The number of features is limited to `most_features`.
        """
        rope = case.rope or ("interleaved" if self.rotates else None)
        features = min(case.features, self.most_features or case.features)
        return replace(case, rope=rope, features=features, masked=case.masked and any(each.masked for each in self.cases))

    def problem(
        self, case: Case, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> Problem:
        """Return a problem with random inputs. For a fixed seed, they are equal for all dtypes and devices, up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        tensors, options = self.build(case, tensor)
        return Problem(self, tensors, options)


SPECS: dict[str, OpSpec] = {}
REGISTERING: set[str] = set()  # modules that register operators when they are imported; worker processes also import them


def register(*specs: OpSpec) -> None:
    """Register operators for tests and measurements. Other packages can also register operators.

    Raises:
        ValueError: one of the names is already registered.
    """
    for spec in specs:
        if spec.name in SPECS:
            raise ValueError(f"name: expected an unused name, got {spec.name!r}, which is already registered")
        SPECS[spec.name] = spec
    REGISTERING.add(sys._getframe(1).f_globals["__name__"])


def draw(spec: OpSpec, case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Return a problem whose inputs are drawn directly on the device. For large inputs, this is faster than `spec.problem`.

    The tensors in `spec.differentiable` require gradients, except those in `spec.fixed` if `case.learned` is False.
    """

    def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        x = torch.empty(shape, device=device, dtype=dtype)
        return x if x.is_meta else x.normal_(0, scale)

    tensors, options = spec.build(case, tensor)
    trained = set(spec.differentiable) - (set() if case.learned else set(spec.fixed))
    return Problem(spec, {name: x.detach().requires_grad_(name in trained) for name, x in tensors.items()}, options)


# Helpers for `build` functions


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
    """Return a random mask, or None if `case.masked` is False. All keys of the last sample are masked.

    The function also fills the masked tokens of k with NaN and the masked tokens of v with inf.
    """
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


def make_exact(case: Case) -> dict[str, int]:
    return {"exact_rows": case.exact} if case.exact else {}


def make_tables(case: Case, device: torch.device) -> dict[str, Any]:
    rope = make_rope(case, device)
    return {} if rope is None else dict(rotary=rope.rotary)


def make_projection(case: Case, tokens: Tensor) -> Tensor:
    heads = case.heads if case.per_head else None
    projection = orthogonal_projection(case.features, case.width, seed=2, num_heads=heads)
    return projection.to(tokens.device, torch.promote_types(tokens.dtype, torch.float32))


def exact_scale(case: Case) -> float:
    """Return a scale that is within a factor of 2 of width ** -0.5, for widths from 4 to 1024.

    Kernels receive the scale or its square root in float32. Both are powers of two, which are exact in float32, so they do not
    limit the accuracy of float64 runs.
    """
    return 0.25 if case.width < 64 else 0.0625


def aggregate_exps(case: Case) -> int:
    return case.batch * case.heads * case.tokens * case.features


def broadcast_exps(case: Case) -> int:
    return case.batch * case.heads * (case.queries or case.tokens) * case.features


def aggregate_flops(case: Case) -> int:
    return 2 * aggregate_exps(case) * (case.width + (case.value_width or case.width))


def broadcast_flops(case: Case) -> int:
    return 2 * broadcast_exps(case) * (case.width + (case.value_width or case.width))
