"""Providers of an operator: this library's backends, its plain PyTorch reference (eager and compiled), and peers.

A peer is a function from another package, or plain PyTorch code like that of published models. It computes the same result as
the operator, up to small differences. The docstrings below describe exceptions, such as softmax attention. The linear layers of
peers are replaced by identities, because the operator does not include them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..testing import SPECS, Problem

Outputs = tuple[Tensor, ...]
OURS = ("triton", "torch")
COMPILER = "inductor"  # backend of torch.compile


@dataclass(frozen=True)
class Contender:
    """One provider, ready to run on one problem.

    Attributes:
        function: the function to measure. It receives the leaves and returns a tensor or a tuple of tensors.
        leaves: the input tensors, in the layout of the provider. Those whose gradients are measured require gradients.
        exact: function that computes the expected outputs from the problem in float64. The default is the reference.
        shown: function that selects the outputs to check, and converts them to the layout of `exact`.
        tolerance: allowed relative error of float32 outputs, compared with `exact`. For 16-bit outputs, 16 times the eps of the
            dtype is added. If None, the allowed error is 4 times the sum of the dtype's eps and the error of the reference in
            the dtype of the problem.
    """

    function: Callable[..., Any]
    leaves: list[Tensor]
    exact: Callable[[Problem], Outputs] = lambda problem: problem(reference=True)
    shown: Callable[[Outputs], Outputs] = lambda outputs: outputs
    tolerance: float | None = None


Maker = Callable[[Problem], Contender]


class Unavailable(Exception):
    """Raised if a provider cannot be measured. The message is one line that states the reason."""


def enter(provider: str, problem: Problem) -> Contender:
    """Return a Contender that runs `provider` on `problem`.

    Raises:
        Unavailable: the package of the provider is not installed, or the provider needs a GPU.
        KeyError: the operator has no provider of that name.
    """
    spec, leaves = problem.spec, list(problem.tensors.values())
    if provider in OURS:
        return Contender(lambda *tensors: spec.function(*tensors, **problem.options, backend=provider), leaves)

    def reference(*tensors: Tensor) -> Any:
        return spec.reference(*tensors, **problem.options)

    if provider == "reference":
        return Contender(reference, leaves)
    if provider == "compiled":
        torch._dynamo.reset()
        return Contender(torch.compile(reference, dynamic=False, backend=COMPILER), leaves)
    module, make = peers(spec.name)[provider]
    if find_spec(module) is None:
        raise Unavailable(f"{provider} is not installed")
    return make(problem)


def providers(op: str, device: str) -> list[str]:
    """Return the names of all providers of `op` on `device` ("cpu" or "cuda"). This library's backends come first."""
    ours = ("torch",) if device == "cpu" else OURS
    return [*ours, "reference", "compiled", *peers(op)]


def peers(op: str) -> dict[str, tuple[str, Maker]]:
    """Return a dict that maps each peer of `op` to the required module and the function that makes the Contender."""
    softmax = {"sdpa": ("torch", sdpa)} if SPECS[op].attends else {}
    return softmax | PEERS.get(op, {})


def public() -> list[str]:
    """Return the names of the public operators. SPECS also contains the primitives (vix_kernels.primitives) and variants."""
    return [name for name, spec in SPECS.items() if spec.public]


# The peers


def sdpa(problem: Problem) -> Contender:
    """Softmax attention with FlashAttention or, in float32 on a GPU, with PyTorch's memory-efficient kernel.

    Only the first 256 queries are checked.
    """
    leaves, scale = [problem.tensors[name] for name in "qkv"], problem.options.get("scale")
    kind = SDPBackend.FLASH_ATTENTION
    if leaves[0].is_cuda and leaves[0].dtype == torch.float32:
        kind = SDPBackend.EFFICIENT_ATTENTION

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v, scale=scale)

    def first_queries(outputs: Outputs) -> Outputs:
        return tuple(x[:, :, :256] for x in outputs)

    def exact(problem: Problem) -> Outputs:
        q, k, v = (problem.tensors[name] for name in "qkv")
        (q,) = first_queries((q,))
        return ((q @ k.mT * (scale or q.shape[3] ** -0.5)).softmax(-1) @ v,)

    return Contender(attention, leaves, exact, first_queries, tolerance=1e-4)


def performer(problem: Problem) -> Contender:
    from performer_pytorch import FastAttention

    q, k, v, projection = (problem.tensors[name] for name in ("q", "k", "v", "projection"))
    peer = FastAttention(dim_heads=q.shape[3], nb_features=len(projection)).to(q.device)
    peer.projection_matrix.copy_(projection)

    def exact(problem: Problem) -> Outputs:
        tensors = problem.tensors | {name: problem.tensors[name] / 4 for name in "qk"}
        return replace(problem, tensors=tensors)(reference=True)

    # performer-pytorch adds an eps of 1e-4 to the features. For q and k with the norms of the problem, the features would be
    # smaller than eps, so q and k are divided by 4. Even then, eps distorts the features, so the tolerance is large.
    return Contender(_autocast(peer, q), [_leaf(q / 4), _leaf(k / 4), v], exact, tolerance=0.3)


def plain_linear(problem: Problem) -> Contender:
    """ReLU linear attention as plain matrix products, as in EfficientViT and SANA."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.relu(), k.relu()
        return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)

    return Contender(attention, [problem.tensors[name] for name in "qkv"], tolerance=1e-4)


def fla(problem: Problem) -> Contender:
    """Causal linear attention from flash-linear-attention. This library's linear attention is not causal.

    With a causal mask, only the last token attends to all tokens, so only its output is checked.
    """
    if not problem.tensors["q"].is_cuda:
        raise Unavailable("flash-linear-attention needs a GPU")
    from fla.ops.linear_attn import chunk_linear_attn

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunk_linear_attn(q.relu(), k.relu(), v, normalize=True)[0]

    leaves = [_leaf(problem.tensors[name].transpose(1, 2)) for name in "qkv"]
    return Contender(
        attention,
        leaves,
        exact=lambda problem: tuple(x[:, :, -1:] for x in problem(reference=True)),
        shown=lambda outputs: tuple(x[:, -1:].transpose(1, 2) for x in outputs),
        tolerance=1e-3,
    )


def nystrom(problem: Problem) -> Contender:
    from nystrom_attention import NystromAttention

    q, k, v, weight = (problem.tensors[name] for name in ("q", "k", "v", "conv_weight"))
    heads, width = q.shape[1], q.shape[3]
    landmarks, taps = problem.options["num_landmarks"], weight.shape[2]
    peer = NystromAttention(
        heads * width, dim_head=width, heads=heads, num_landmarks=landmarks, residual_conv_kernel=taps
    ).to(q.device)  # fmt: skip
    peer.to_qkv, peer.to_out = nn.Identity(), nn.Identity()
    with torch.no_grad():
        peer.res_conv.weight.copy_(weight)
    packed = _leaf(torch.cat([_merged(x) for x in (q, k, v)], -1))
    parameters = [peer.res_conv.weight]

    def exact(problem: Problem) -> Outputs:
        options = problem.options | dict(landmarks="pad_front", pinv_init="original")
        return tuple(_merged(x) for x in replace(problem, options=options)(reference=True))

    # nystrom-attention divides the initial value of its iterative inverse by maxima over the whole batch. `exact` receives only
    # one sample, so the tolerance allows for a different initial value.
    return Contender(_autocast(lambda x, *_: peer(x), q), [packed, *parameters], exact, tolerance=1e-2)


def linformer(problem: Problem) -> Contender:
    """Linformer with the keys as values, because the package applies to_k and to_v to the same input. The cost is the same."""
    from linformer import LinformerSelfAttention

    q, k, key_projection, value_projection = (
        problem.tensors[name] for name in ("q", "k", "key_projection", "value_projection")
    )
    heads, tokens, width = k.shape[1:]
    peer = LinformerSelfAttention(heads * width, tokens, k=key_projection.shape[1], heads=heads).to(q.device)
    peer.to_q = peer.to_k = peer.to_v = peer.to_out = nn.Identity()
    with torch.no_grad():
        peer.proj_k.copy_(key_projection[:tokens])
        peer.proj_v.copy_(value_projection[:tokens])

    def exact(problem: Problem) -> Outputs:
        tensors = problem.tensors | {"v": problem.tensors["k"]}
        return tuple(_merged(x) for x in replace(problem, tensors=tensors)(reference=True))

    leaves = [_leaf(_merged(x)) for x in (q, k)]
    return Contender(_autocast(lambda q, k, *_: peer(q, k), q), [*leaves, peer.proj_k, peer.proj_v], exact, tolerance=1e-4)


def rotary(problem: Problem) -> Contender:
    from rotary_embedding_torch import RotaryEmbedding

    q, k = problem.tensors["q"], problem.tensors["k"]
    peer = RotaryEmbedding(dim=q.shape[3]).to(q.device)

    def rotate(q: Tensor, k: Tensor) -> Outputs:
        return peer.rotate_queries_or_keys(q), peer.rotate_queries_or_keys(k)

    return Contender(rotate, [q, k], tolerance=2e-3)  # the package computes the angles as products in float32


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


def _autocast(peer: Callable[..., Tensor], like: Tensor) -> Callable[..., Tensor]:
    """Return a function that calls `peer`, under autocast if `like` has a 16-bit dtype.

    If the parameters were cast to 16 bits instead, the peer would fail or would no longer compute sums in float32.
    """
    enabled = like.dtype != torch.float32

    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast(like.device.type, like.dtype if enabled else torch.bfloat16, enabled=enabled):
            return peer(*inputs)

    return call


# For each operator and peer: the module that must be importable, and the Maker. `peers` adds softmax attention.
PEERS: dict[str, dict[str, tuple[str, Maker]]] = {
    "performer_attention": {"performer-pytorch": ("performer_pytorch", performer)},
    "linear_attention": {"plain": ("torch", plain_linear), "flash-linear-attention": ("fla", fla)},
    "nystrom_attention": {"nystrom-attention": ("nystrom_attention", nystrom)},
    "linformer_attention": {"linformer": ("linformer", linformer)},
    "apply_rope": {"rotary-embedding-torch": ("rotary_embedding_torch", rotary)},
}
