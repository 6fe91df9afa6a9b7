"""Tests that invalid arguments raise an error that names the argument, the expected value and the received value."""

from __future__ import annotations

import pytest
import torch

from vix_kernels import (
    Rope,
    agent_attention,
    apply_rope,
    backends,
    fourier_mixing,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    orthogonal_projection,
    performer_attention,
    rope_1d,
    rope_axial,
    rope_mixed,
)
from vix_kernels.nn import (
    AgentAttention,
    Attention,
    FourierMixing,
    LinearAttention,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
)


def tensors(batch=2, heads=2, tokens=8, width=16, features=12):
    q, k, v = (torch.randn(batch, heads, tokens, width) for _ in range(3))
    return {"q": q, "k": k, "v": v, "projection": orthogonal_projection(features, width, seed=0)}


MASK = torch.ones(2, 8, dtype=torch.bool)
PERFORMER = {
    "q is not a tensor": ({"q": 3}, TypeError, "q: expected a Tensor, got int"),
    "q of rank 3": ({"q": torch.randn(2, 8, 16)}, ValueError, r"q: expected 4 dimensions .* got shape \(2, 8, 16\)"),
    "q of integers": ({"q": torch.ones(2, 2, 8, 16, dtype=torch.int64)}, TypeError, "q: expected a floating-point dtype"),
    "k of another dtype": ({"k": torch.randn(2, 2, 8, 16).half()}, TypeError, "k: expected q's dtype float32, got float16"),
    "k of another width": ({"k": torch.randn(2, 2, 8, 24)}, ValueError, "k: expected q's head_dim 16, got 24"),
    "k of another batch": ({"k": torch.randn(3, 2, 8, 16)}, ValueError, "k: expected q's batch size 2, got 3"),
    "grouped heads": ({"k": torch.randn(2, 1, 8, 16)}, ValueError, "k: expected q's 2 heads, got 1 .*grouped"),
    "v of another length": ({"v": torch.randn(2, 2, 9, 16)}, ValueError, "v: expected k's 8 tokens, got 9"),
    "v on another device": ({"v": torch.empty(2, 2, 8, 16, device="meta")}, ValueError, "v: expected q's device cpu, got meta"),
    "no tokens": ({"k": torch.randn(2, 2, 0, 16)}, ValueError, "k: expected at least one head, token and channel"),
    "projection of another width": (
        {"projection": torch.randn(12, 8)}, ValueError, "projection: expected 16 columns to match q's head_dim, got 8"),
    "projection of rank 1": ({"projection": torch.randn(16)}, ValueError, r"projection: expected shape \(M, head_dim\)"),
    "projection in bfloat16": (
        {"projection": torch.randn(12, 16).bfloat16()}, TypeError, "projection: expected float32 .*, got bfloat16"),
    "projection for other heads": (
        {"projection": torch.randn(3, 12, 16)}, ValueError, "projection: expected q's 2 heads, got 3"),
    "mask of floats": (
        {"key_padding_mask": torch.ones(2, 8)}, TypeError, "key_padding_mask: expected dtype bool .*, got float32"),
    "mask of another shape": ({"key_padding_mask": MASK[:, :7]}, ValueError, r"key_padding_mask: .*\(2, 8\), got \(2, 7\)"),
    "mask as a list": ({"key_padding_mask": [[True] * 8] * 2}, TypeError, "key_padding_mask: expected a Tensor, got list"),
    "mask as a bool": ({"key_padding_mask": True}, TypeError, "key_padding_mask: expected a Tensor, got bool"),
    "sparse tokens": ({"k": torch.ones(2, 2, 8, 16).to_sparse()}, TypeError, "k: expected a dense .*sparse_coo"),
    "nested tokens": (
        {"v": torch.nested.nested_tensor([torch.ones(2, 8, 16)] * 2)}, TypeError, "v: expected a dense .*, got a nested one"),
    "tokens in float8": (
        {each: torch.ones(2, 2, 8, 16).to(torch.float8_e4m3fn) for each in "qkv"}, TypeError, "q: expected .* float8_e4m3"),
    "scale as text": ({"scale": "0.5"}, TypeError, "scale: expected a finite number > 0, got '0.5'"),
    "scale as a list": ({"scale": [0.5]}, TypeError, r"scale: expected a finite number > 0, got \[0.5\]"),
    "infinite scale": ({"scale": float("inf")}, ValueError, "scale: expected a finite number > 0, got inf"),
    "rope as text": ({"rope": "axial"}, TypeError, "rope: expected a Rope .*, got str"),
    "zero scale": ({"scale": 0.0}, ValueError, "scale: expected a finite number > 0, got 0.0"),
    "NaN scale": ({"scale": float("nan")}, ValueError, "scale: expected a finite number > 0, got nan"),
    "scale as a tensor": ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a Python number, got a Tensor"),
    "rope of another length": ({"rope": rope_1d(9, 16)}, ValueError, "rope: expected angles for q's 8 tokens, got 9"),
    "rope too wide": ({"rope": rope_1d(8, 32)}, ValueError, "rope: expected dim <= q's head_dim 16, got 32"),
    "rope as a tensor": ({"rope": torch.ones(8, 16)}, TypeError, "rope: expected a Rope .*, got Tensor"),
    "rope and unequal lengths": (
        {"rope": rope_1d(8, 16), "q": torch.randn(2, 2, 5, 16)},
        ValueError,
        "rope: expected q and k of equal lengths, got 5 and 8"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'triton', .*, got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong, kind, message", PERFORMER.values(), ids=PERFORMER)
def test_performer_attention_names_invalid_arguments(wrong, kind, message) -> None:
    arguments = tensors() | wrong
    positional = [arguments.pop(name) for name in ("q", "k", "v", "projection")]
    with pytest.raises(kind, match=message):
        performer_attention(*positional, **arguments)


@pytest.mark.parametrize("wrong, kind, message", PERFORMER.values(), ids=PERFORMER)
def test_linear_attention_names_invalid_arguments(wrong, kind, message) -> None:
    if "scale" in wrong:
        pytest.skip("linear attention has no scale")
    arguments = tensors() | wrong
    positional = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(kind, match=message):
        linear_attention(*positional, **arguments)


NYSTROM = {
    "more landmarks than tokens": ({"num_landmarks": 9}, "num_landmarks: expected 1 to 8, the number of tokens, got 9"),
    "more landmarks than tokens after the prefix": (
        {"num_landmarks": 7, "prefix_tokens": 2},
        "num_landmarks: expected 1 to 6, the number of tokens after the prefix, got 7"),
    "no landmarks": ({"num_landmarks": 0}, "num_landmarks: expected 1 to 8, the number of tokens, got 0"),
    "landmarks as text": ({"num_landmarks": "a"}, "num_landmarks: expected an integer, got 'a'"),
    "landmarks as a float": ({"num_landmarks": 4.0}, "num_landmarks: expected an integer, got 4.0"),
    "grid as a number": ({"landmarks": "grid", "grid_size": 4}, r"grid_size: expected \(height, width\), got 4"),
    "grid as text": ({"landmarks": "grid", "grid_size": "24"}, r"grid_size: expected \(height, width\), got '24'"),
    "grid of floats": ({"landmarks": "grid", "grid_size": (2.0, 4.0)}, "grid_size: expected an integer, got 2.0"),
    "prefix as a bool": ({"prefix_tokens": True}, "prefix_tokens: expected an integer, got True"),
    "unknown landmarks": ({"landmarks": "random"}, "landmarks: expected one of 'segment', 'grid', 'pad_front', got 'random'"),
    "grid without its size": (
        {"landmarks": "grid"}, r"grid_size: expected \(height, width\) for landmarks='grid', otherwise None, got None"),
    "size without a grid": ({"grid_size": (2, 4)}, r"grid_size: expected .*otherwise None, got \(2, 4\)"),
    "grid of another size": (
        {"landmarks": "grid", "grid_size": (3, 3)}, r"grid_size: expected height \* width = 8 tokens, got \(3, 3\)"),
    "grid that includes the prefix": (
        {"landmarks": "grid", "grid_size": (2, 4), "prefix_tokens": 1, "num_landmarks": 2},
        r"grid_size: expected height \* width = 7 tokens after the prefix, got \(2, 4\)"),
    "landmarks that do not fit the grid": (
        {"landmarks": "grid", "grid_size": (2, 4), "num_landmarks": 5},
        r"num_landmarks: expected a product rows \* columns with at most 2 rows and 4 columns \(grid_size\), got 5"),
    "prefix of all tokens": ({"prefix_tokens": 8}, "prefix_tokens: expected 0 to 7 for 8 tokens, got 8"),
    "prefix with pad_front": (
        {"landmarks": "pad_front", "prefix_tokens": 1}, "prefix_tokens: expected 0 for landmarks='pad_front', got 1"),
    "negative iterations": ({"pinv_iterations": -1}, "pinv_iterations: expected an integer >= 0, got -1"),
    "unknown pinv_init": ({"pinv_init": "newton"}, "pinv_init: expected one of 'exact', 'original', got 'newton'"),
    "convolution of rank 2": (
        {"conv_weight": torch.ones(2, 3)}, r"conv_weight: expected shape \(heads, 1, taps, 1\), got \(2, 3\)"),
    "convolution of other heads": (
        {"conv_weight": torch.ones(3, 1, 3, 1)}, "conv_weight: expected q's 2 heads, got 3"),
    "even taps": ({"conv_weight": torch.ones(2, 1, 4, 1)}, "conv_weight: expected an odd number of taps, got 4"),
    "convolution of integers": (
        {"conv_weight": torch.ones(2, 1, 3, 1, dtype=torch.int64)}, "conv_weight: expected a floating-point dtype, got int64"),
    "convolution and unequal lengths": (
        {"conv_weight": torch.ones(2, 1, 3, 1), "q": torch.randn(2, 2, 5, 16)},
        "conv_weight: expected as many queries as tokens, got 5 queries and 8 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("wrong, message", NYSTROM.values(), ids=NYSTROM)
def test_nystrom_attention_names_invalid_landmarks(wrong, message) -> None:
    arguments = tensors() | dict(num_landmarks=4) | wrong
    del arguments["projection"]
    positional = [arguments.pop(name) for name in "qkv"]
    with pytest.raises((TypeError, ValueError), match=message):
        nystrom_attention(*positional, **arguments)


@pytest.mark.parametrize("wrong, kind, message", PERFORMER.values(), ids=PERFORMER)
def test_nystrom_attention_names_invalid_arguments(wrong, kind, message) -> None:
    if "projection" in wrong:
        pytest.skip("Nystrom attention has no projection")
    arguments = tensors() | dict(num_landmarks=4) | wrong
    del arguments["projection"]
    positional = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(kind, match=message):
        nystrom_attention(*positional, **arguments)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        performer_attention(*tensors().values(), dropout=0.1)


CONSTRUCTORS = {
    "no features": (lambda: orthogonal_projection(0, 8, seed=0), ValueError, "num_features: expected an integer >= 1, got 0"),
    "fractional seed": (lambda: orthogonal_projection(4, 8, seed=0.5), TypeError, "seed: expected an integer, got 0.5"),
    "features as a float": (
        lambda: orthogonal_projection(4.0, 8, seed=0), TypeError, "num_features: expected an integer >= 1, got 4.0"),
    "rope length as text": (lambda: rope_1d("8", 8), TypeError, "tokens: expected an integer >= 1, got '8'"),
    "rope base as text": (lambda: rope_1d(8, 8, base="1"), TypeError, "base: expected a finite number > 0, got '1'"),
    "rope from lists": (lambda: Rope([0.0], [1.0]), TypeError, "cos: expected a Tensor, got list"),
    "unknown scaling": (
        lambda: orthogonal_projection(4, 8, seed=0, scaling="one"), ValueError, "scaling: expected 'chi' or 'sqrt', got 'one'"),
    "odd rope width": (lambda: rope_1d(8, 7), ValueError, "dim: expected a multiple of 2 channels, got 7"),
    "axial rope width": (lambda: rope_axial(2, 2, 6), ValueError, "dim: expected a multiple of 4 channels, got 6"),
    "axial rope without rows": (lambda: rope_axial(0, 2, 8), ValueError, "height: expected an integer >= 1, got 0"),
    "mixed rope of rank 2": (
        lambda: rope_mixed(2, 2, torch.ones(2, 4)), ValueError, r"frequencies: expected shape \(2, heads, .*got \(2, 4\)"),
    "rope without tokens": (lambda: rope_1d(0, 8), ValueError, "tokens: expected an integer >= 1, got 0"),
    "unknown layout": (
        lambda: rope_1d(4, 8, layout="neox"), ValueError, "layout: expected 'interleaved' or 'half', got 'neox'"),
    "negative prefix": (lambda: rope_1d(4, 8, prefix_tokens=-1), ValueError, "prefix_tokens: expected an integer >= 0, got -1"),
    "heads that do not divide": (lambda: Attention(64, 5), ValueError, "num_heads: expected a divisor of dim 64, got 5"),
    "unknown module backend": (lambda: Attention(64, 4, backend="gpu"), ValueError, "backend: expected one of .*, got 'gpu'"),
    "unknown feature map": (
        lambda: LinearAttention(64, 4, feature_map="tanh"), ValueError, "feature_map: expected .*, got 'tanh'"),
    "negative eps": (lambda: LinearAttention(64, 4, eps=-1.0), ValueError, "eps: expected a finite number >= 0, got -1.0"),
    "eps as a tensor": (
        lambda: LinearAttention(64, 4, eps=torch.tensor(1e-6)), TypeError, "eps: expected a Python number, got a Tensor"),
    "attention dropout": (
        lambda: PerformerAttention(64, 4, attn_drop=0.1), NotImplementedError, r"attn_drop: expected 0 .*, got 0.1"),
    "width as text": (lambda: Attention("64"), TypeError, "dim: expected an integer >= 1, got '64'"),
    "zero width": (lambda: FourierMixing(0), ValueError, "dim: expected an integer >= 1, got 0"),
    "heads as a float": (lambda: Attention(64, 4.0), TypeError, "num_heads: expected an integer >= 1, got 4.0"),
    "NaN dropout": (
        lambda: Attention(64, proj_drop=float("nan")), ValueError, "proj_drop: expected a number from 0 to 1, got nan"),
    "dropout as text": (lambda: FourierMixing(64, proj_drop="a"), TypeError, "proj_drop: expected a number .*, got 'a'"),
    "dropout of None": (lambda: Attention(64, attn_drop=None), TypeError, "attn_drop: expected a number from 0 to 1, got None"),
    "seed as a float": (lambda: PerformerAttention(64, seed=1.0), TypeError, "seed: expected an integer >= 0, got 1.0"),
    "seed as text": (lambda: PerformerAttention(64, seed="1"), TypeError, "seed: expected an integer >= 0, got '1'"),
    "landmarks as text": (
        lambda: NystromAttention(64, num_landmarks="a"), TypeError, "num_landmarks: expected an integer >= 1, got 'a'"),
    "no landmarks": (lambda: NystromAttention(64, num_landmarks=0), ValueError, "num_landmarks: .* >= 1, got 0"),
    "grid of floats": (
        lambda: NystromAttention(64, grid_size=(2.0, 2)), TypeError, "grid_size: expected an integer, got 2.0"),
    "grid as text": (
        lambda: AgentAttention(64, grid_size="24"), TypeError, r"grid_size: expected \(height, width\), got '24'"),
    "grid without rows": (
        lambda: AgentAttention(64, grid_size=(0, 8)), ValueError, r"grid_size: expected two integers >= 1, got \(0, 8\)"),
    "negative prefix of a module": (
        lambda: AgentAttention(64, prefix_tokens=-1), ValueError, "prefix_tokens: expected an integer >= 0, got -1"),
    "agents as a bool": (lambda: AgentAttention(64, num_agents=True), TypeError, "num_agents: .* >= 1, got True"),
    "even taps": (lambda: NystromAttention(64, residual_conv_kernel=4), ValueError, "residual_conv_kernel: expected an odd"),
    "taps of None": (lambda: NystromAttention(64, residual_conv_kernel=None), TypeError, "residual_conv_kernel: .*, got None"),
    "length as a float": (lambda: LinformerAttention(64, seq_len=8.0), TypeError, "seq_len: expected an integer >= 1, got 8.0"),
}  # fmt: skip


@pytest.mark.parametrize("make, kind, message", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructors_name_invalid_arguments(make, kind, message) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("kind", [Attention, PerformerAttention, LinformerAttention], ids=lambda kind: kind.__name__)
def test_modules_refuse_masks_that_are_not_bool(kind) -> None:
    module = kind(32, 2, **({"seq_len": 4} if kind is LinformerAttention else {}))
    with pytest.raises(TypeError, match=r"key_padding_mask: expected dtype bool \(True = valid\), got float32"):
        module(torch.randn(1, 4, 32), key_padding_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(batch, tokens\) = \(1, 4\), got \(1, 3\)"):
        module(torch.randn(1, 4, 32), key_padding_mask=torch.ones(1, 3, dtype=torch.bool))


TOKENS = {
    "not a tensor": ([[1.0]], TypeError, "x: expected a Tensor, got list"),
    "another width": (torch.ones(1, 4, 31), ValueError, r"x: expected \(batch, tokens, 32\), got shape \(1, 4, 31\)"),
    "rank 2": (torch.ones(4, 32), ValueError, r"x: expected \(batch, tokens, 32\), got shape \(4, 32\)"),
    "rank 4": (torch.ones(1, 1, 4, 32), ValueError, r"x: expected \(batch, tokens, 32\), got shape \(1, 1, 4, 32\)"),
    "integers": (torch.ones(1, 4, 32, dtype=torch.int64), TypeError, "x: expected a floating-point dtype, got int64"),
    "sparse": (torch.ones(1, 4, 32).to_sparse(), TypeError, "x: expected a dense Tensor, got a sparse_coo one"),
}


@pytest.mark.parametrize("x, error, message", TOKENS.values(), ids=TOKENS)
def test_modules_name_invalid_tokens(x, error, message) -> None:
    for kind in (Attention, PerformerAttention, FourierMixing):
        with pytest.raises(error, match=message):
            kind(32, 2)(x)


def test_modules_refuse_tokens_of_another_dtype() -> None:
    module, x = Attention(32, 2), torch.ones(1, 4, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="x: expected the module's dtype float32, got bfloat16"):
        module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    module.qkv = torch.nn.Sequential(module.qkv)  # a different layer may accept a dtype other than that of its weight
    with pytest.raises(RuntimeError, match="dtype"):
        module(x)


def test_modules_refuse_attention_masks_and_causal_attention() -> None:
    module, x = PerformerAttention(32, 2), torch.randn(1, 4, 32)
    with pytest.raises(NotImplementedError, match="attn_mask: expected None"):
        module(x, torch.zeros(4, 4))
    with pytest.raises(NotImplementedError, match="is_causal: expected False"):
        module(x, is_causal=True)


def test_triton_error_lists_every_reason(monkeypatch) -> None:
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    arguments = {name: x.double() for name, x in tensors(width=260).items()}
    with pytest.raises(RuntimeError, match="cannot run here: triton is not installed; .*on the CPU.*; .*float64; .*260"):
        performer_attention(*arguments.values(), backend="triton")


def test_auto_serves_inputs_that_triton_cannot() -> None:
    arguments = {name: x.double() for name, x in tensors(width=260).items()}
    assert performer_attention(*arguments.values()).shape == (2, 2, 8, 260)


def test_apply_rope_names_invalid_arguments() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="k: expected q's head_dim 8, got 6"):
        apply_rope(q, q[..., :6], rope_1d(4, 6))


SHARED = {name: each for name, each in PERFORMER.items() if "projection" not in name}
LINFORMER = SHARED | {
    "projection is not a tensor": (
        {"key_projection": 3}, TypeError, "key_projection: expected a Tensor, got int"),
    "projection of rank 1": (
        {"key_projection": torch.ones(8)}, ValueError, r"key_projection: expected shape \(tokens, K\) .*, got \(8,\)"),
    "projection without slots": (
        {"key_projection": torch.ones(8, 0)}, ValueError, r"key_projection: expected shape .*, got \(8, 0\)"),
    "projection in float16": (
        {"value_projection": torch.ones(8, 5).half()}, TypeError, "value_projection: expected float32 or .*, got float16"),
    "projection for other heads": (
        {"key_projection": torch.ones(3, 8, 5)}, ValueError, "key_projection: expected q's 2 heads, got 3"),
    "projection for a shorter sequence": (
        {"value_projection": torch.ones(7, 5)}, ValueError,
        "value_projection: expected at least 8 rows, one per token of k, got 7"),
    "projection on another device": (
        {"key_projection": torch.ones(8, 5, device="meta")}, ValueError, "key_projection: expected q's device cpu, got meta"),
    "projections to different numbers of slots": (
        {"value_projection": torch.ones(8, 6)}, ValueError, "value_projection: expected key_projection's shape .*5.*6"),
}  # fmt: skip


@pytest.mark.parametrize("wrong, kind, message", LINFORMER.values(), ids=LINFORMER)
def test_linformer_attention_names_invalid_arguments(wrong, kind, message) -> None:
    arguments = {name: torch.randn(2, 2, 8, 16) for name in "qkv"}
    arguments |= {"key_projection": torch.ones(9, 5), "value_projection": torch.ones(9, 5)} | wrong
    positional = [arguments.pop(name) for name in ("q", "k", "v", "key_projection", "value_projection")]
    with pytest.raises(kind, match=message):
        linformer_attention(*positional, **arguments)


AGENT = SHARED | {
    "agents are not a tensor": ({"agents": 3}, TypeError, "agents: expected a Tensor, got int"),
    "agents of another width": (
        {"agents": torch.ones(2, 2, 5, 8)}, ValueError, r"agents: .* = \(2, 2, A, 16\), got \(2, 2, 5, 8\)"),
    "agents for other heads": (
        {"agents": torch.ones(2, 1, 5, 16)}, ValueError, r"agents: .* = \(2, 2, A, 16\), got \(2, 1, 5, 16\)"),
    "no agents": ({"agents": torch.ones(2, 2, 0, 16)}, ValueError, r"agents: .*, got \(2, 2, 0, 16\)"),
    "agents of another dtype": (
        {"agents": torch.ones(2, 2, 5, 16).half()}, TypeError, "agents: expected q's dtype float32, got float16"),
    "agents on another device": (
        {"agents": torch.ones(2, 2, 5, 16, device="meta")}, ValueError, "agents: expected q's device cpu, got meta"),
    "agent mask of floats": (
        {"agent_mask": torch.ones(2, 5)}, TypeError, "agent_mask: expected dtype bool .*, got float32"),
    "agent mask of another shape": (
        {"agent_mask": MASK}, ValueError, r"agent_mask: expected shape \(batch, A\) = \(2, 5\), got \(2, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("wrong, kind, message", AGENT.values(), ids=AGENT)
def test_agent_attention_names_invalid_arguments(wrong, kind, message) -> None:
    arguments = {name: torch.randn(2, 2, 8, 16) for name in "qkv"} | {"agents": torch.randn(2, 2, 5, 16)} | wrong
    positional = [arguments.pop(name) for name in ("q", "k", "v", "agents")]
    with pytest.raises(kind, match=message):
        agent_attention(*positional, **arguments)


def test_linformer_module_names_invalid_lengths() -> None:
    with pytest.raises(ValueError, match="seq_len: expected an integer >= 1, got 0"):
        LinformerAttention(32, 2, seq_len=0)
    module = LinformerAttention(32, 2, seq_len=4, num_landmarks=6)
    with pytest.raises(ValueError, match="key_projection: expected at least 5 rows, one per token of k, got 4"):
        module(torch.randn(1, 5, 32))
    with pytest.raises(ValueError, match=r"key_padding_mask: .*\(1, 4\), got \(1, 3\)"):
        module(torch.randn(1, 4, 32), key_padding_mask=torch.ones(1, 3, dtype=torch.bool))


FOURIER = {
    "x is not a tensor": (3, {}, TypeError, "x: expected a Tensor, got int"),
    "x of rank 4": (torch.ones(1, 2, 3, 4), {}, ValueError, r"x: expected 3 dimensions .* got shape \(1, 2, 3, 4\)"),
    "x of integers": (torch.ones(1, 2, 3, dtype=torch.int64), {}, TypeError, "x: expected a floating-point dtype, got int64"),
    "no tokens": (torch.ones(1, 0, 3), {}, ValueError, r"x: expected at least one token and channel, got shape \(1, 0, 3\)"),
    "unknown norm": (torch.ones(1, 2, 3), {"norm": "forward"}, ValueError, "norm: expected None or 'ortho', got 'forward'"),
    "unknown backend": (torch.ones(1, 2, 3), {"backend": "fft"}, ValueError, "backend: expected one of .*, got 'fft'"),
}


@pytest.mark.parametrize("x, options, kind, message", FOURIER.values(), ids=FOURIER)
def test_fourier_mixing_names_invalid_arguments(x, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        fourier_mixing(x, **options)


def test_fourier_module_names_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="norm: expected None or 'ortho', got 'backward'"):
        FourierMixing(8, norm="backward")
    with pytest.raises(NotImplementedError, match="attn_drop: expected 0 .*, got 0.1"):
        FourierMixing(8, attn_drop=0.1)
