"""Other libraries' attentions over the same tokens; what is not installed is named as absent.

Where a peer projects its input, its linear maps are taken out, so that both time the attention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vix_kernels.testing import Case, Problem

Call = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]  # a function and the leaves it takes


def flash(problem: Problem, case: Case) -> Call:
    """Softmax attention: FlashAttention in 16 bits, torch's memory-efficient kernel in float32."""
    leaves = [problem.tensors[name] for name in "qkv"]
    kind = SDPBackend.EFFICIENT_ATTENTION if leaves[0].dtype == torch.float32 else SDPBackend.FLASH_ATTENTION

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind if q.is_cuda else SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v)

    return attention, leaves


def performer(problem: Problem, case: Case) -> Call:
    from performer_pytorch import FastAttention

    q, k, v, projection = (problem.tensors[name] for name in ("q", "k", "v", "projection"))
    peer = FastAttention(dim_heads=case.width, nb_features=case.features).to(q.device)
    peer.projection_matrix.copy_(projection)
    return _autocast(peer, q), [q, k, v]


def rotary(problem: Problem, case: Case) -> Call:
    from rotary_embedding_torch import RotaryEmbedding

    q, k = problem.tensors["q"], problem.tensors["k"]
    peer = RotaryEmbedding(dim=case.width).to(q.device)
    return lambda q, k: (peer.rotate_queries_or_keys(q), peer.rotate_queries_or_keys(k)), [q, k]


def nystrom(problem: Problem, case: Case) -> Call:
    from nystrom_attention import NystromAttention

    q, k, v = (problem.tensors[name] for name in "qkv")
    inner = case.heads * case.width
    peer = NystromAttention(inner, dim_head=case.width, heads=case.heads, num_landmarks=64).to(q.device)
    peer.to_qkv, peer.to_out = nn.Identity(), nn.Identity()
    return _autocast(peer, q), [torch.cat([_merged(x) for x in (q, k, v)], -1).detach().requires_grad_()]


def linformer(problem: Problem, case: Case) -> Call:
    from linformer import LinformerSelfAttention

    q, k = problem.tensors["q"], problem.tensors["k"]
    peer = LinformerSelfAttention(case.heads * case.width, case.tokens, k=case.features, heads=case.heads).to(q.device)
    peer.to_q = peer.to_k = peer.to_v = peer.to_out = nn.Identity()  # its values are its keys: the arithmetic is the same
    return _autocast(peer, q), [_merged(x).detach().requires_grad_() for x in (q, k)]


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _autocast(peer: nn.Module, like: Tensor) -> Callable[..., Tensor]:
    """The peers are written for autocast: cast to 16 bits as a whole they fail or lose their float32 sums."""
    enabled = like.dtype != torch.float32

    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast(like.device.type, like.dtype if enabled else torch.bfloat16, enabled=enabled):
            return peer(*inputs)

    return call


# name -> (module that must be importable, operator it is a peer of, maker)
PEERS: dict[str, tuple[str, str, Callable[[Problem, Case], Call]]] = {
    "sdpa": ("torch", "performer_attention", flash),
    "performer-pytorch": ("performer_pytorch", "performer_attention", performer),
    "nystrom-attention": ("nystrom_attention", "nystrom_attention", nystrom),
    "linformer": ("linformer", "linformer_attention", linformer),
    "rotary-embedding-torch": ("rotary_embedding_torch", "apply_rope", rotary),
}


def installed(module: str) -> bool:
    return find_spec(module) is not None
