"""Random cases for each op. Outputs and gradients are compared with those of a definition in float64 (definitions.py).

The gradients are those of all differentiable inputs. `check(case)` returns a message for each failed check of a `Case`.
`cases(op, backend)` is the hypothesis strategy that draws cases.

The error budget is the largest error that is allowed. It is twice the error of plain PyTorch in the same precision, plus an
allowance for rounding, because PyTorch's error may be small by chance, or even 0. The allowance covers a few rounding errors in
the dtype of the result, relative to the size of the summed terms before they cancel. It also covers the effects of simulated
rounding errors in inputs and intermediate results.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vix_kernels

from . import definitions
from .definitions import EXACT, How

# The number of rounding errors to allow for in a sum, about the square root of its number of terms.
ROUNDINGS = 16  # for sums over up to 256 tokens or channels
PRODUCTS = 8  # for sums over up to 64 landmarks
FEW_RUNS, MANY_RUNS = 2, 32  # number of evaluations of the definition, each with different rounding errors
NOT_FINITE = "not finite"
LARGEST = 3_000_000  # maximum number of elements in any tensor of a definition
MODULES = (
    "Attention", "PerformerAttention", "FeatureAttention", "LinearAttention", "NystromAttention", "LinformerAttention",
    "AgentAttention",
)  # fmt: skip
EXPONENTIAL = ("performer_attention", "feature_attention")
ATTENTIONS = (
    *EXPONENTIAL, "linear_attention", "nystrom_attention", "linformer_attention", "agent_attention",
)  # fmt: skip
OPS = (*ATTENTIONS, "fourier_mixing", "apply_rope", "attention_weights", *MODULES)


@dataclass(frozen=True, repr=False)
class Case:
    """All settings of a random problem. The repr is a constructor call that recreates the case."""

    op: str
    backend: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    batch: int = 1
    heads: int = 1
    tokens: int = 8
    queries: int | None = None  # default: tokens
    width: int = 16
    value_width: int | None = None  # default: width
    features: int = 4  # number of random features, landmarks, agents, or projected keys
    pattern: str = "normal"  # distribution of q and k
    magnitude: float = 1.0
    value_magnitude: float = 1.0
    memory: str = "dense"
    mask: str | None = None
    junk: float | None = None  # value written to masked tokens
    rope: str | None = None
    layout: str = "interleaved"
    rotary: int | None = None  # number of rotated channels; default: as many as possible
    prefix: int = 0
    rows: int = 1  # number of rows in the grid after the prefix
    scale: float | None = None
    autocast: str | None = None
    checkpoint: bool = False
    threads: int = 1
    projected: bool = False  # whether linear attention uses random features
    per_head: bool = False
    shared: bool = False  # whether Linformer uses the same projection for keys and values
    feature_map: str = "relu"
    eps: float = 1e-6
    landmarks: str = "segment"
    iterations: int = 6
    start: str = "exact"
    taps: int = 0
    norm: str | None = None
    of: str = "performer_attention"  # the op whose attention_weights are computed

    def __repr__(self) -> str:
        defaults = {field.name: field.default for field in fields(self)}
        given = (f"{name}={value!r}" for name, value in vars(self).items() if value != defaults[name])
        return f"Case({', '.join(given)})"

    @property
    def self_attention(self) -> bool:
        return self.queries in (None, self.tokens)


@dataclass(frozen=True)
class Problem:
    """The tensors and functions of a case.

    Attributes:
        tensors: differentiable inputs, by name. Masked elements of k, v and agents are 0. If `case.junk` is set, masked
            elements of q and x are 0, too. `Trial.attempt` sets all masked elements to `case.junk` in copies of the tensors.
        run: function that computes the library's output from (tensors, backend).
        define: function that computes the exact output from (float64 tensors, how).
        hidden: for each tensor name or "out", a mask that is True for masked elements.
        ignored: names in `hidden` whose masked elements are not compared.
        cast: names of the tensors that autocast converts to a lower precision.
    """

    tensors: dict[str, Tensor]
    run: Callable[[dict[str, Tensor], str], Tensor]
    define: Callable[[dict[str, Tensor], How], Tensor]
    hidden: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    cast: tuple[str, ...] = ("q", "k", "v", "agents", "x")


# Inputs


class Draw:
    """Draws the random inputs of a case, using the seed of the case."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.generator = torch.Generator().manual_seed(case.seed)
        self.wide = torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        largest = torch.finfo(dtype).max / 2
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * size).clamp(-largest, largest).to(dtype)

    def tokens(self, *shape: int, name: str = "") -> Tensor:
        """Draw q, k or agents from the distribution that `case.pattern` names."""
        x, size, pattern = self.normal(*shape, dtype=torch.float64), self.case.magnitude, self.case.pattern
        if pattern == "constant":  # all tokens in q and k are equal
            x = torch.randn(shape[-1], generator=torch.Generator().manual_seed(self.case.seed), dtype=torch.float64).expand(
                shape
            )
        elif pattern == "negative":
            x = -x.abs()
        elif pattern == "dead_channel":
            x = torch.cat([-x[..., :1].abs() - 1, x[..., 1:]], -1)
        elif pattern == "uneven":  # each token has a different magnitude
            x = x * 10 ** (-6 * torch.rand(*shape[:-1], 1, generator=self.generator, dtype=torch.float64))
        elif pattern == "zeros":
            x = x * (torch.rand(*shape[:-1], 1, generator=self.generator) < 0.5)
        largest = torch.finfo(self.dtype).max / 2
        return (x * size).clamp(-largest, largest).to(self.dtype)

    def mask(self, kind: str | None, batch: int, tokens: int) -> Tensor | None:
        if kind is None:
            return None
        mask = torch.rand(batch, tokens, generator=self.generator) < 0.6
        if kind == "all_valid":
            mask[:] = True
        elif kind == "one_valid":
            mask[:] = False
            mask[:, int(torch.randint(tokens, (), generator=self.generator))] = True
        elif kind == "empty_sample":
            mask[-1:] = False
        return mask

    def projection(self, shape: tuple[int, ...], size: float = 1.0) -> Tensor:
        return self.normal(*shape, size=size, dtype=self.wide)


def problem(case: Case) -> Problem:
    if case.op == "fourier_mixing":
        return fourier_problem(case)
    if case.op in MODULES:
        return module_problem(case)
    draw, queries = Draw(case), case.queries or case.tokens
    shape = (case.batch, case.heads)
    tensors = {
        "q": draw.tokens(*shape, queries, case.width),
        "k": draw.tokens(*shape, case.tokens, case.width),
        "v": draw.normal(*shape, case.tokens, case.value_width or case.width, size=case.value_magnitude),
    }
    mask = draw.mask(case.mask, case.batch, case.tokens)
    add_rope, run_rope, rotate = rotation(case, draw)
    if case.op == "apply_rope":
        del tensors["v"]
        tensors |= add_rope

        def run(x: dict[str, Tensor], backend: str) -> Tensor:
            keywords = on(x["q"].device, {"rope": run_rope(x)}) | {"backend": backend}
            return torch.cat(vix_kernels.apply_rope(x["q"], x["k"], **keywords), 2)

        return Problem(tensors, run, lambda x, how: torch.cat(rotate(x, x["q"], x["k"], EXACT), 2), cast=())
    op = case.of if case.op == "attention_weights" else case.op
    extra, options, attend = attention(op, case, draw, mask)
    tensors |= extra | add_rope
    hidden, ignored = {}, ()
    if mask is not None:
        masked = ~mask[:, None, :, None]
        hidden = {"k": masked, "v": masked}
        if case.self_attention:
            hidden |= {"q": masked, "out": masked}
            ignored = ("q", "out") if case.junk is not None else ()
        if "agent_mask" in options:
            hidden["agents"] = ~options["agent_mask"][:, None, :, None]
    for name, where in hidden.items():
        if name in tensors:
            # Masked queries still attend to the keys, so they keep their values unless `case.junk` is set.
            if name != "q" or case.junk is not None:
                tensors[name] = tensors[name].masked_fill(where, 0.0)
    function, positional = getattr(vix_kernels, op), [name for name in ("q", "k", "v", *extra) if name != "conv_weight"]

    def call(x: dict[str, Tensor], backend: str) -> tuple[list[Tensor], dict[str, Any]]:
        keywords = on(x["q"].device, options | {"key_padding_mask": mask, "rope": run_rope(x)}) | {"backend": backend}
        names = list(positional)
        if op == "linear_attention" and "projection" in x:
            names.remove("projection")
            keywords["projection"] = x["projection"]
        if "conv_weight" in x:
            keywords["conv_weight"] = x["conv_weight"]
        return [x[name] for name in names], keywords

    def run(x: dict[str, Tensor], backend: str) -> Tensor:
        arguments, keywords = call(x, backend)
        return function(*arguments, **keywords)

    def define(x: dict[str, Tensor], how: How) -> Tensor:
        return attend(x | dict(zip("qk", rotate(x, x["q"], x["k"], how), strict=True)), how)

    if case.op != "attention_weights":
        return Problem(tensors, run, define, hidden, ignored)
    del tensors["v"]
    token = case.seed % queries

    def run_row(x: dict[str, Tensor], backend: str) -> Tensor:
        (q, k, _, *others), keywords = call(x | {"v": x["k"]}, backend)
        return vix_kernels.attention_weights(function, q, k, *others, token=token, **keywords)

    def define_row(x: dict[str, Tensor], how: How) -> Tensor:
        unit = torch.eye(case.tokens, dtype=torch.float64).expand(*shape, -1, -1)
        return define(x | {"v": unit}, how)[:, :, token]

    return Problem(tensors, run_row, define_row)


def on(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, (Tensor, vix_kernels.Rope)) else x for name, x in options.items()}


def rotation(case: Case, draw: Draw) -> tuple[dict[str, Tensor], Callable, Callable]:
    """Return the rotary embedding of a case.

    Returns:
        The tensors that determine learned angles, a function that builds the library's `Rope` from the tensors, and a function
        that rotates q and k according to the definition.
    """
    if case.rope is None:
        return {}, lambda x: None, lambda x, q, k, how: (q, k)
    after_prefix = case.tokens - case.prefix
    columns, options = after_prefix // case.rows, dict(layout=case.layout, prefix_tokens=case.prefix)
    dim = case.rotary or case.width // 4 * 4

    def rotated(tokens: Tensor, cos: Tensor, sin: Tensor, how: How) -> Tensor:
        return how.stored(definitions.rotated(tokens, cos, sin, case.layout))

    if case.rope == "mixed":
        frequencies = draw.normal(2, case.heads, dim // 2, size=0.5, dtype=draw.wide)

        def run(x: dict[str, Tensor]) -> Any:
            return vix_kernels.rope_mixed(case.rows, columns, x["frequencies"], **options)

        def rotate(x: dict[str, Tensor], q: Tensor, k: Tensor, how: How) -> tuple[Tensor, Tensor]:
            angles = definitions.angles_mixed(case.rows, columns, x["frequencies"])
            others = angles.detach() if how.fixed_totals else angles  # the gradients through q and through k also cancel
            return rotated(q, angles.cos(), angles.sin(), how), rotated(k, others.cos(), others.sin(), how)

        return {"frequencies": frequencies}, run, rotate
    if case.rope == "1d":
        rope, angles = vix_kernels.rope_1d(after_prefix, dim, **options), definitions.angles_1d(after_prefix, dim, 10000.0)
    else:
        rope = vix_kernels.rope_axial(case.rows, columns, dim, **options)
        angles = definitions.angles_axial(case.rows, columns, dim, 100.0)
    cos, sin = (x.float().double() for x in (angles.cos(), angles.sin()))  # the library stores tables in float32
    return {}, lambda x: rope, lambda x, q, k, how: (rotated(q, cos, sin, how), rotated(k, cos, sin, how))


def attention(
    op: str, case: Case, draw: Draw, mask: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any], Callable[[dict[str, Tensor], How], Tensor]]:
    """Return the additional inputs, the options and the definition of the operator `op`.

    Returns:
        The tensors other than q, k and v; the options of the library's function; and a function that evaluates the definition.
        The first argument of this function contains all tensors, with q and k already rotated.
    """
    scale = case.scale or case.width**-0.5
    scaled = {} if case.scale is None else {"scale": case.scale}
    per_head = (case.heads,) if case.per_head else ()
    if op == "performer_attention":
        return (
            {"projection": draw.projection((*per_head, case.features, case.width))},
            scaled,
            lambda x, how: definitions.performer_attention(
                x["q"], x["k"], x["v"], x["projection"], scale=scale, valid=mask, how=how
            ),
        )
    if op == "feature_attention":
        shape, gaussian = (*per_head, case.features, case.width), 0.5 if case.op == op else 1.0  # 1 is the module's default
        extra = {name: draw.projection(shape) for name in ("query_features", "key_features")}
        extra["feature_bias"] = draw.projection((*per_head, case.features))
        return (
            extra,
            scaled | dict(gaussian=gaussian),
            lambda x, how: definitions.feature_attention(
                *(x[name] for name in ("q", "k", "v", *extra)), scale=scale, gaussian=gaussian, valid=mask, how=how
            ),
        )
    if op == "linear_attention":
        extra = {"projection": draw.projection((*per_head, case.features, case.width))} if case.projected else {}
        options = dict(feature_map=case.feature_map, eps=case.eps)
        return (
            extra,
            options,
            lambda x, how: definitions.linear_attention(
                x["q"], x["k"], x["v"], x.get("projection"), valid=mask, how=how, **options
            ),
        )
    if op == "linformer_attention":
        shape = (*per_head, case.tokens + case.seed % 3, case.features)
        names = ("key_projection",) if case.shared else ("key_projection", "value_projection")
        extra = {name: draw.projection(shape, size=case.features**-0.5) for name in names}
        return (
            extra,
            scaled,
            lambda x, how: definitions.linformer_attention(
                x["q"], x["k"], x["v"], *(x[name] for name in names), scale=scale, valid=mask, how=how
            ),
        )
    if op == "agent_attention":
        agents = draw.tokens(case.batch, case.heads, case.features, case.width)
        agents_valid = draw.mask(case.mask, case.batch, case.features)
        return (
            {"agents": agents},
            scaled | ({} if agents_valid is None else {"agent_mask": agents_valid}),
            lambda x, how: definitions.agent_attention(
                x["q"], x["k"], x["v"], x["agents"], scale=scale, valid=mask, agents_valid=agents_valid, how=how
            ),
        )
    grid = (case.rows, (case.tokens - case.prefix) // case.rows) if case.landmarks == "grid" else None
    extra = {"conv_weight": draw.projection((case.heads, 1, case.taps, 1), size=case.taps**-0.5)} if case.taps else {}
    options = scaled | dict(
        num_landmarks=case.features, landmarks=case.landmarks, grid_size=grid, prefix_tokens=case.prefix,
        pinv_iterations=case.iterations, pinv_init=case.start,
    )  # fmt: skip
    return (
        extra,
        options,
        lambda x, how: definitions.nystrom_attention(
            x["q"], x["k"], x["v"], x.get("conv_weight"), scale=scale, count=case.features, iterations=case.iterations,
            start=case.start, landmarks=case.landmarks, grid=grid, prefix=case.prefix, valid=mask, how=how,
        ),
    )  # fmt: skip


def fourier_problem(case: Case) -> Problem:
    x = Draw(case).tokens(case.batch, case.tokens, case.width)
    return Problem(
        {"x": x},
        lambda x, backend: vix_kernels.fourier_mixing(x["x"], norm=case.norm, backend=backend),
        lambda x, _: definitions.fourier_mixing(x["x"], norm=case.norm),
        cast=() if case.autocast == "float16" else ("x",),
    )


def module_problem(case: Case) -> Problem:
    """Return the problem for a module in vix_kernels.nn. Its differentiable inputs include the parameters of the module."""
    draw, dim = Draw(case), case.heads * case.width
    op = {"Attention": None, "AgentAttention": "agent_attention"}.get(
        case.op, case.op[: -len("Attention")].lower() + "_attention"
    )
    options = {
        "PerformerAttention": dict(num_features=case.features),
        "FeatureAttention": dict(num_features=case.features),
        "LinearAttention": dict(feature_map=case.feature_map, eps=case.eps),
        "NystromAttention": dict(num_landmarks=case.features, residual_conv_kernel=case.taps, prefix_tokens=case.prefix),
        "LinformerAttention": dict(seq_len=case.tokens, num_landmarks=case.features),
        "AgentAttention": dict(num_agents=case.features, prefix_tokens=case.prefix),
    }.get(case.op, {})
    torch.manual_seed(case.seed)
    made = {
        backend: getattr(vix_kernels.nn, case.op)(dim, case.heads, qkv_bias=True, backend=backend, **options).to(draw.dtype)
        for backend in (case.backend, "reference")
    }
    module, shape = made[case.backend], (case.batch, case.tokens, dim)
    made["reference"].load_state_dict(module.state_dict())
    mask = draw.mask(case.mask, case.batch, case.tokens)
    tensors = {"x": draw.tokens(*shape)}
    names = [name for name, _ in module.named_parameters()]
    tensors |= {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    state = {name: x.detach().double() for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    add_rope, run_rope, rotate = rotation(case, draw)
    tensors |= add_rope
    _, _, attend = attention(op, case, draw, mask) if op not in (None, "agent_attention") else (0, 0, None)

    def run(x: dict[str, Tensor], backend: str) -> Tensor:
        parameters = {name: x[name] for name in names if name in x}
        keywords = on(x["x"].device, {"key_padding_mask": mask, "rope": run_rope(x)})
        module = copy.deepcopy(made[backend]).to(x["x"].device)  # functional_call would swap parameters in all threads
        return torch.func.functional_call(module, parameters, (x["x"],), keywords)

    def define(x: dict[str, Tensor], how: How) -> Tensor:
        weights = state | x
        packed = torch.nn.functional.linear(x["x"], weights["qkv.weight"], weights["qkv.bias"])
        q, k, v = packed.unflatten(-1, (3, case.heads, case.width)).permute(2, 0, 3, 1, 4)
        rotated_qkv = dict(zip("qkv", (*rotate(x, q, k, how), v), strict=True))
        if op is None:
            out = definitions.softmax_attention(*rotated_qkv.values(), scale=case.width**-0.5, valid=mask, how=how)
        elif op == "agent_attention":
            out = pooled_agents(case, q, rotated_qkv, mask, how)
        else:
            names = {"res_conv.weight": "conv_weight"}
            out = attend(rotated_qkv | {names.get(name, name): value for name, value in weights.items()}, how)
        out = out.transpose(1, 2).flatten(2)
        return torch.nn.functional.linear(out, weights["proj.weight"], weights["proj.bias"])

    hidden, ignored = {}, ()
    if mask is not None:
        hidden = {"x": ~mask[..., None], "out": ~mask[..., None]}
        if case.junk is not None:
            tensors["x"] = tensors["x"].masked_fill(hidden["x"], 0.0)
            ignored = ("x", "out")
    return Problem(tensors, run, define, hidden, ignored)


def op_of_module(module: str) -> str | None:
    """Return the op that a module calls, or None for softmax attention."""
    return None if module == "Attention" else module.removesuffix("Attention").lower() + "_attention"


def pooled_agents(case: Case, q: Tensor, rotated_qkv: dict[str, Tensor], mask: Tensor | None, how: How) -> Tensor:
    """Agent attention with pooled queries as agents. In each sample, agents without a valid token are dropped."""
    windows, outputs = definitions.windows_of(case.tokens, case.features, prefix=case.prefix), []
    for b in range(q.shape[0]):
        agents = definitions.averages(q[b], windows, None if mask is None else mask[b])[None]
        one = {name: x[b : b + 1] for name, x in rotated_qkv.items()}
        valid = None if mask is None else mask[b : b + 1]
        if agents.shape[2]:
            out = definitions.agent_attention(*one.values(), agents, scale=case.width**-0.5, valid=valid, how=how)
        else:
            out = one["q"] * 0
        outputs.append(out)
    return torch.cat(outputs) if outputs else rotated_qkv["q"]


# Memory layouts


def placed(x: Tensor, memory: str, junk: float = float("nan")) -> Tensor:
    """Return a tensor with the values of `x` in the layout `memory`. Unused elements of the storage are set to `junk`."""
    if memory == "transposed":  # tokens before heads, like the output of a linear layer
        if x.dim() < 2:
            return x
        return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else x.mT.contiguous().mT
    if memory == "last_stride":  # channels are not adjacent
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if memory == "sliced":  # a view with an offset, and with unused elements around every dimension
        buffer = x.new_full([size + 3 for size in x.shape[:-1]] + [x.shape[-1] + 5], junk)
        view = buffer[tuple(slice(2, 2 + size) for size in x.shape)]
        return view.copy_(x)
    if memory == "offset":
        return torch.cat([x.new_full((1,), junk), x.flatten()])[1:].view(x.shape)
    if memory == "expanded":
        for dim in range(x.dim() - 1):
            if x.shape[dim] > 1 and torch.equal(x.narrow(dim, 0, 1).expand_as(x), x):
                x = x.narrow(dim, 0, 1).clone().expand_as(x)
        return x
    return x.contiguous()


# The check

Results = dict[str, Tensor]  # the output under "out", and each gradient under the name of its tensor
Noise = Callable[[Tensor], Tensor]


class Trial:
    """A case with its inputs. Computes the library's results and the exact results."""

    def __init__(self, case: Case) -> None:
        self.case, self.problem, dtype = case, problem(case), getattr(torch, case.dtype)
        self.tensors = self.problem.tensors
        if case.memory == "expanded":  # all heads of an expanded tensor are equal
            self.tensors = self.tensors | {
                name: x[:, :1].expand_as(x).contiguous() for name, x in self.tensors.items() if name in "qkv" and x.dim() == 4
            }
        self.cast = getattr(torch, case.autocast) if case.autocast else dtype
        self.computed = self.cast if self.problem.cast else dtype  # the dtype of the computation
        self.stored = dtype if case.op == "attention_weights" else self.computed  # the dtype of the output
        self.differentiable = case.op != "attention_weights"
        exact = self.problem.define(self.doubles(self.tensors), EXACT).detach()
        cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64)
        if "out" in self.problem.ignored:
            cotangent = cotangent.masked_fill(self.problem.hidden["out"], 0.0)
        self.cotangent = cotangent.to(self.stored)
        # Upper bound for the dot product of an output gradient with a value or an output. In float16, such dot products may
        # overflow before they are multiplied by small attention weights.
        values = [x for x in (self.tensors.get("v"), exact) if x is not None and x.numel()]
        self.products = max((rows(x) * rows(self.cotangent) for x in values), default=0.0)

    def doubles(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Round tensors as autocast does, then convert them to float64."""
        rounds = {name for name, x in tensors.items() if name in self.problem.cast and x.dtype != torch.float64}
        return {name: (x.to(self.cast) if name in rounds else x).double() for name, x in tensors.items()}

    def exact(self, tensors: dict[str, Tensor], how: How = EXACT, noise: Noise = lambda x: x, signs: Tensor | None = None):
        """Apply `noise` to the inputs and to the gradient of the output, and return the float64 results.

        If `signs` is given, the gradient of the output is multiplied by it.
        """
        leaves = {name: noise(x).detach().requires_grad_(self.differentiable) for name, x in self.doubles(tensors).items()}
        cotangent = noise(self.cotangent.double())
        return results(leaves, self.problem.define(leaves, how), cotangent if signs is None else cotangent * signs)

    def attempt(self, backend: str, tensors: dict[str, Tensor], junk: float | None = None) -> Results:
        """Return the library's results for `tensors`. If `junk` is given, masked elements are set to it."""
        case, leaves = self.case, {}
        for name, x in tensors.items():
            if junk is not None and name in self.problem.hidden:
                x = x.masked_fill(self.problem.hidden[name], junk)
            leaves[name] = placed(x.to(case.device), case.memory).detach().requires_grad_(self.differentiable)
        before = {name: x.detach().clone() for name, x in leaves.items()}

        def run(*values: Tensor) -> Tensor:
            return self.problem.run(dict(zip(leaves, values, strict=True)), backend)

        with torch.autocast(case.device, self.cast) if case.autocast else nullcontext():
            if case.checkpoint and self.differentiable:
                out = checkpoint(run, *leaves.values(), use_reentrant=False)
            else:
                out = run(*leaves.values())
        if out.shape != self.cotangent.shape or out.dtype != self.stored:
            expected = f"{tuple(self.cotangent.shape)} in {self.stored}"
            raise AssertionError(f"out: expected {expected}, got {tuple(out.shape)} in {out.dtype}")
        found = results(leaves, out, placed(self.cotangent.to(case.device), case.memory))
        for name, x in leaves.items():
            if not same(x, before[name]):
                raise AssertionError(f"{name} was written to")
        return {name: x.cpu() for name, x in found.items()}


def rows(x: Tensor) -> float:
    """Return the largest norm of the rows of `x`."""
    return x.double().norm(dim=-1).max().item()


def results(leaves: dict[str, Tensor], out: Tensor, cotangent: Tensor) -> Results:
    found = {"out": out.detach()}
    if any(x.requires_grad for x in leaves.values()):
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
        found |= {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads, strict=True)}
    return found


def same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def rounding(eps: float, alike: tuple[int, ...] = (), step: float = 0.0) -> Noise:
    """Return a function that changes every element by a relative error of up to `eps` and an absolute error of up to `step`.

    Along the dimensions in `alike`, all elements get the same relative and absolute errors, so equal tokens stay equal.
    """
    generator = torch.Generator().manual_seed(2)

    def rounded(x: Tensor) -> Tensor:
        shape = list(x.shape)
        for dim in alike if x.dim() > 1 else ():
            shape[dim] = 1
        noise = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        return x * (1 + eps * noise) + step * noise if step else x * (1 + eps * noise)

    return rounded


def stored_as(dtype: torch.dtype) -> Noise:
    """Return a function that adds simulated rounding errors to a tensor and its gradient, as if they were stored in `dtype`.

    Subnormal numbers have a fixed spacing, so the errors also include an absolute term.
    """
    limits = torch.finfo(dtype)
    noise = rounding(limits.eps, step=limits.smallest_normal * limits.eps)

    def stored(x: Tensor) -> Tensor:
        x = noise(x)
        if x.requires_grad:
            x.register_hook(noise)
        return x

    return stored


def check(case: Case) -> list[str]:
    """Return a message for each failed check of `case`."""
    try:
        trial = Trial(case)
    except Exception as error:  # all cases are valid, so an error is a failed check
        return [f"building raises {type(error).__name__}: {error}"]
    try:
        with ThreadPoolExecutor(case.threads) as pool:
            actual, *others = pool.map(lambda _: trial.attempt(case.backend, trial.tensors, case.junk), range(case.threads))
    except Exception as error:
        return [f"raises {type(error).__name__}: {error}"]
    wrong = [f"{name} differs between threads" for other in others for name in actual if not same(actual[name], other[name])]
    try:
        plain = trial.attempt("reference", trial.tensors)
    except Exception as error:
        return [*wrong, f"backend='reference' raises {type(error).__name__}: {error}"]
    return wrong + compared(trial, actual, plain) if trial.cotangent.numel() else wrong


def compared(trial: Trial, actual: Results, plain: Results) -> list[str]:
    """Return a message for each sample of a result whose error exceeds the budget.

    Where large logits are nearly equal, one rounding error can change the whole result, and plain PyTorch may have a small
    error only by chance. A failed comparison is therefore repeated with a larger budget. This budget covers more simulated
    rounding errors, and the errors of plain PyTorch on nearby inputs (the inputs perturbed by one rounding error). Non-finite
    results are always reported. Other failures are reported only if they also occur for most nearby inputs.
    """
    exact = trial.exact(trial.tensors)
    names, most = list(exact), torch.finfo(trial.computed).max / 4
    if "frequencies" in exact and any(exact[name].abs().max() > most for name in "qk" if name in exact):
        names.remove("frequencies")  # this gradient is computed from gradients of q and k, which may overflow
    eps = torch.finfo(torch.promote_types(trial.computed, torch.float32)).eps
    if trial.computed == torch.float64:
        eps *= 2  # the definition also has rounding errors
    inputs, one_rounding = rounding(2 * eps), rounding(torch.finfo(trial.computed).eps, alike=(-2,))
    how = How(
        stored=stored_as(trial.computed),
        logits=rounding(eps, alike=(-2,)),
        products=rounding(PRODUCTS * eps, alike=(-2, -1)),
        sums=rounding(eps),
    )
    signs = torch.Generator().manual_seed(3)
    terms, rounded, references, nearby = [], [], [(plain, exact)], []

    def violations(actual: Results, exact: Results) -> list[str]:
        return [line for name in names for line in beyond(trial, name, actual[name], exact[name], terms, rounded, references)]

    for runs in FEW_RUNS, MANY_RUNS:
        for _ in range(runs):
            flips = torch.randint(2, trial.cotangent.shape[-1:], generator=signs) * 2.0 - 1
            terms.append(trial.exact(trial.tensors, How(fixed_totals=True), signs=flips if terms else None))
            rounded.append(trial.exact(trial.tensors, how, inputs))
        found = violations(actual, exact)
        if not found:
            return []
        for _ in range(MANY_RUNS // 4):
            near = {name: one_rounding(x.double()).to(x.dtype) for name, x in trial.tensors.items()}
            nearby.append((near, trial.exact(near)))
            references.append((trial.attempt("reference", near), nearby[-1][1]))
    if any(NOT_FINITE in line for line in found):
        return found
    again = [bool(violations(trial.attempt(trial.case.backend, near), truth)) for near, truth in nearby[:5]]
    return found if sum(again) >= 3 else []


def beyond(
    trial: Trial, name: str, actual: Tensor, exact: Tensor, terms: list[Results], rounded: list[Results],
    references: list[tuple[Results, Results]],
) -> list[str]:  # fmt: skip
    """Return a message for each sample whose error exceeds the budget. A result without a batch dimension is one sample."""
    skip = trial.problem.hidden[name] if name in trial.problem.ignored else None

    def samples(x: Tensor) -> Tensor:
        x = x.double() if skip is None else x.double().masked_fill(skip, 0.0)
        return x.reshape(x.shape[0], -1) if name in ("out", "q", "k", "v", "agents", "x") else x.reshape(1, -1)

    def largest(*many: Tensor) -> list[float]:
        """Return the largest norm of each sample over the given tensors. Norms that are not finite count as 0."""
        return torch.stack([samples(x).norm(dim=1).nan_to_num(0.0, posinf=0.0) for x in many]).amax(0).tolist()

    stored, computed = torch.finfo(actual.dtype), torch.finfo(trial.computed)
    most = min(stored.max, computed.max) / 4
    precision = torch.finfo(torch.promote_types(trial.computed, torch.float32)).eps
    if trial.computed == torch.float64:
        precision *= 16  # the definition also has rounding errors
    least = max(stored.smallest_normal * stored.eps, torch.finfo(torch.float32).smallest_normal)
    sizes, changes = largest(exact, *(each[name] for each in terms)), largest(*(each[name] - exact for each in rounded))
    errors = largest(*(plain[name].double() - truth[name] for plain, truth in references))
    found, label = [], "out" if name == "out" else f"gradient of {name}"
    for b, (x, truth, plain) in enumerate(zip(samples(actual), samples(exact), samples(references[0][0][name]), strict=True)):
        where = f"{label}[{b}]" if len(samples(exact)) > 1 else label
        if not truth.isfinite().all() or truth.abs().max() > most:
            continue  # the exact result is not representable
        if trial.computed == torch.float16 and name != "out" and trial.products > most:
            continue
        if trial.computed == torch.float16 and name != "out" and not (x.isfinite().all() or plain.isfinite().all()):
            continue  # intermediate gradients overflow float16, even in plain PyTorch
        if not x.isfinite().all():
            count = int((~x.isfinite()).sum())
            found.append(f"{where}: {count} of {x.numel()} {NOT_FINITE}, exact values up to {truth.abs().max():.1e}")
        elif plain.isfinite().all():  # otherwise there is no error of plain PyTorch to compare with
            forgiven = 3 * max(stored.eps, computed.eps) * sizes[b] + 2 * changes[b]
            forgiven += ROUNDINGS * (precision * sizes[b] + least * math.sqrt(x.numel()))
            error, budget = (x - truth).norm().item(), 2 * errors[b] + forgiven
            if not error <= budget:
                found.append(
                    f"{where}: error {error:.1e} > {budget:.1e} (reference {errors[b]:.1e}, terms {sizes[b]:.1e}, exact "
                    f"{truth.norm():.1e})"
                )
    return found


# Strategies

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 196, 197, 200)
WIDTHS = (1, 2, 3, 4, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 80, 96, 127, 128, 129, 160, 192, 255, 256, 257, 300)
MAGNITUDES = (1e-38, 1e-30, 1e-10, 1e-3, 0.1, 1.0, 1.0, 1.0, 3.0, 16.0, 90.0, 1e3, 1e4)


@st.composite
def cases(draw: st.DrawFn, op: str, backend: str = "torch", device: str = "cpu") -> Case:
    """Draw a case that `op` supports. Cases for Triton's interpreter are small."""
    kernels = backend == "triton"
    small = kernels and device == "cpu"

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def up_to(limit: int, sizes: tuple[int, ...] = SIZES) -> int:
        return one_of(*(size for size in sizes if size <= limit) or (limit,))

    def sometimes(value: Any, other: Any = None) -> Any:
        return one_of(other, other, other, value)

    names: dict[str, Any] = dict(op=op, backend=backend, device=device, seed=draw(st.integers(0, 2**20)))
    names["dtype"] = one_of("float32", "float32", "bfloat16", "float16", *(() if kernels else ("float64",)))
    names["batch"] = draw(st.integers(0, 2 if small else 3))
    names["heads"] = draw(st.integers(1, 2 if small else 4))
    names["pattern"] = one_of("normal", "normal", "normal", "constant", "negative", "dead_channel", "uneven", "zeros")
    names["magnitude"] = one_of(*MAGNITUDES, float(f"{10 ** draw(st.floats(-2, 4)):.2g}"))
    if kernels:
        names["magnitude"] = max(names["magnitude"], 1e-30)  # GPUs and the interpreter may flush subnormal numbers
    names["memory"] = one_of("dense", "dense", "transposed", "sliced", "offset", "expanded", "last_stride")
    names["tokens"] = up_to(24 if small else 200)
    if small:
        widths = tuple(width for width in WIDTHS if 8 <= width <= (64 if names["tokens"] <= 9 else 33))
        widths += (255, 256) if names["tokens"] <= 4 and op != "nystrom_attention" else ()
    else:
        widths = tuple(width for width in WIDTHS if 8 <= width <= 256) if kernels else WIDTHS
    names["width"] = one_of(*widths)
    names["checkpoint"], names["threads"] = sometimes(True, False), 1 if small else sometimes(3, 1)
    if names["dtype"] == "float32" and op not in MODULES:
        names["autocast"] = sometimes(one_of("bfloat16", "float16"))
    if op == "fourier_mixing":
        return Case(**names, norm=one_of(None, "ortho"))
    if op in MODULES:
        names["width"] = one_of(*(width for width in widths if width <= 64))
        names["magnitude"] = min(names["magnitude"], 100.0)  # the linear layers increase the magnitude
        names["memory"] = one_of("dense", "sliced", "offset")
        names["dtype"] = one_of("float32", "float32", "float64") if not kernels else "float32"
    else:
        names["value_width"] = sometimes(one_of(*widths))
        names["value_magnitude"] = one_of(1.0, 1.0, 1.0, 1e-30, 1e-5, 1e3)
    attention = {name: name for name in ATTENTIONS}.get(op)
    if op == "attention_weights":
        attention = names["of"] = one_of(*ATTENTIONS)
        names["memory"], names["value_width"] = "dense", None
    elif op in MODULES:
        attention = op_of_module(op)
    tokens, width = names["tokens"], names["width"]
    if op in ATTENTIONS or op == "attention_weights":
        names["scale"] = sometimes(one_of(1.0, 0.01, 3.0))
    if attention == "linear_attention":
        names.pop("scale", None)
        names |= dict(feature_map=one_of("relu", "elu"), eps=one_of(1e-6, 1e-6, 0.0, 0.125))
        names["projected"] = sometimes(True, False) if op not in MODULES else False
        if kernels and names["eps"]:  # eps / (a feature of a key times one of a query) must be finite
            names["magnitude"] = max(names["magnitude"], 1e-15)
        if not names["eps"] and "value_magnitude" in names:  # avoids underflow of features times tiny values
            names["value_magnitude"] = max(names["value_magnitude"], 1e-5)
        if not names["eps"] and names["feature_map"] == "elu":  # keeps 1 / denominator, about exp(|x|), finite
            names["magnitude"] = min(names["magnitude"], 3.0)
    if attention == "linformer_attention" and "float16" in (names["dtype"], names.get("autocast")):
        names["magnitude"] = min(names["magnitude"], 100.0)  # projected keys are stored in float16
    names["features"] = up_to(9 if small else 64)
    names["per_head"], names["shared"] = sometimes(True, False), sometimes(True, False)
    if op in MODULES:
        names["per_head"] = names["shared"] = False
    # Only self-attention has RoPE, a grid and a convolution. In cross-attention, the numbers of queries and keys differ.
    self_attention = op in MODULES or op == "apply_rope" or one_of(True, True, False)
    if not self_attention:
        names["queries"] = up_to(24 if small else 200)
    queries = names.get("queries") or tokens
    self_attention = queries == tokens
    if self_attention and (attention == "nystrom_attention" or op == "AgentAttention" or one_of(True, False)):
        names["prefix"] = one_of(0, 0, min(1, tokens - 1), min(3, tokens - 1))
    after_prefix = min(tokens, queries) - names.get("prefix", 0)
    divisors = [n for n in range(1, after_prefix + 1) if after_prefix % n == 0]
    names["rows"] = one_of(*divisors) if self_attention else 1
    rotates = self_attention and width >= 2 and attention != "fourier_mixing"
    if op == "apply_rope" or (rotates and one_of(True, False)):
        kinds = [kind for kind, least in (("1d", 2), ("axial", 4), ("mixed", 2)) if width >= least]
        if not kinds:
            names["width"] = width = 8
            kinds = ["1d"]
        names["rope"], names["layout"] = one_of(*kinds), one_of("interleaved", "half")
        step = 4 if names["rope"] == "axial" else 2
        names["rotary"] = one_of(step, width // step * step)
    elif attention != "nystrom_attention" and op != "AgentAttention":
        names["prefix"] = 0
    if op != "apply_rope" and one_of(True, False):
        names["mask"] = one_of("random", "all_valid", "empty_sample", "one_valid")
        if names["mask"] == "empty_sample" and op == "Attention":
            names["mask"] = "random"  # torch defines a different result for rows without valid keys
        if op != "attention_weights":
            names["junk"] = one_of(None, float("nan"), float("inf"))
    if attention == "nystrom_attention" or op == "AgentAttention":
        names["features"] = min(names["features"], after_prefix)
    if attention == "nystrom_attention":
        names["iterations"] = one_of(6, 6, 1, 3) if op not in MODULES else 6
        if op not in MODULES:
            names["start"] = one_of("exact", "exact", "original")
            names["landmarks"] = one_of("segment", "grid", "pad_front") if self_attention else one_of("segment", "pad_front")
        if names.get("landmarks") == "pad_front":
            names["prefix"] = 0 if not names.get("rope") else names["prefix"]
            if names["prefix"]:
                names["landmarks"] = "segment"
        if names.get("landmarks") == "grid":
            columns = after_prefix // names["rows"]
            if definitions.nearest_grid(names["features"], names["rows"], columns) is None:
                names["features"] = names["rows"]
        if self_attention and op != "attention_weights":
            names["taps"] = one_of(0, 1, 3, 5, 33)
    # The definition stores the weights of all pairs of tokens and, with feature maps, every feature for each pair.
    inner = names["features"] if attention in EXPONENTIAL or names.get("projected") else width
    inner = inner if attention in (*EXPONENTIAL, "linear_attention") else 1
    while names["batch"] * names["heads"] * queries * tokens * inner > LARGEST:
        if names["batch"] > 1:
            names["batch"] -= 1
        elif names["heads"] > 1:
            names["heads"] -= 1
        elif attention in EXPONENTIAL or names.get("projected"):
            names["features"] = inner = inner // 2
        else:
            names["width"] = width = inner = inner // 2
            names["rotary"] = None if width >= 4 else names.get("rotary")
            if names.get("rope"):
                names["rope"], names["rotary"] = ("1d", 2) if width >= 2 else (None, None)
    return Case(**names)
