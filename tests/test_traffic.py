"""Tests that memory traffic is measured correctly, and that the traffic of operators stays within limits.

The tests run in Triton's interpreter and need no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="traffic is counted in Triton's interpreter, which is not installed here")

import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from vix_kernels import apply_rope, backends, conditions, nystrom_attention, orthogonal_projection, performer_attention, rope_1d
from vix_kernels._triton import launch as launching
from vix_kernels._triton.launch import launch
from vix_kernels.measure.traffic import Pass, Traffic, measure

pytestmark = pytest.mark.skipif(not backends.interpreted(), reason="kernels are compiled in this process, not interpreted")


@triton.jit
def add_kernel(x, y, rows, stride, N, BLOCK: tl.constexpr):
    """Load one row of x twice, and add both copies to y."""
    at = tl.arange(0, BLOCK)
    inside = at < N
    row = x + tl.program_id(0) % rows * stride
    b_x = tl.load(row + at, mask=inside, other=0.0) + tl.load(row + at, mask=inside, other=0.0)
    tl.store(y + at, tl.load(y + at, mask=inside, other=0.0) + b_x, mask=inside)


@triton.jit
def count_kernel(x):
    tl.atomic_add(x, 1)


def added(x: Tensor, programs: int = 3) -> Tensor:
    y = torch.zeros(x.shape[1], dtype=x.dtype)
    launch(add_kernel, (programs,), x, y, x.shape[0], x.stride(0), x.shape[1], BLOCK=64)
    return y


def performer(tokens: int, batch: int = 4, heads: int = 4, features: int = 110, **options) -> Traffic:
    """Measure the forward and backward passes of Performer attention with head width 32 and gradients of q, k and v.

    The dtype is float16, because the interpreter takes half as long as with bfloat16. Launches and traffic are the same.
    """
    q, k, v = (torch.randn(batch, heads, tokens, 32, dtype=torch.float16, requires_grad=True) for _ in range(3))
    return measure(performer_attention, q, k, v, orthogonal_projection(features, 32, seed=0), backend="triton", **options)


def loaded_bytes(traffic: Pass, name: str) -> list[int]:
    """Return how many bytes each launch loads from the argument `name`. Skip launches without this argument."""
    return [each.loaded[name] for each in traffic.launches if name in each.loaded]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_launch_counts_each_byte_once_per_direction(dtype: torch.dtype) -> None:
    """Bytes that a launch reads twice count once. Masked lanes, and rows that are not read, do not count."""
    size = dtype.itemsize
    traffic = measure(added, torch.randn(5, 37, dtype=dtype)).forward
    zeros, kernel = traffic.launches
    assert (zeros.kernel, zeros.loaded, zeros.stored) == ("aten::zeros", {}, {"result": 37 * size})
    assert kernel.kernel == "add_kernel"
    assert kernel.loaded == {"x": 3 * 37 * size, "y": 37 * size} and kernel.stored == {"y": 37 * size}
    assert traffic.least == (3 + 1) * 37 * size
    assert traffic.bytes == (1 + 3 + 1 + 1) * 37 * size and traffic.ratio == 6 / 4


def test_views_count_only_their_elements() -> None:
    x = torch.randn(37)
    expanded = measure(added, x.expand(3, 37)).forward
    assert loaded_bytes(expanded, "x") == [37 * 4] and expanded.least == 2 * 37 * 4
    every_other = measure(added, torch.randn(6, 100)[::2, 10:47]).forward
    assert loaded_bytes(every_other, "x") == [3 * 37 * 4] and every_other.least == 4 * 37 * 4


def test_pytorch_operators_count() -> None:
    """PyTorch operators that read or write data are counted, too, for example casts, copies, sums and multiplications."""

    def function(x: Tensor) -> Tensor:
        wide = x.view(30).reshape(10, 3).to(torch.float64).to(torch.float64)
        total = torch.empty(1, 3, dtype=torch.float64).copy_(wide.sum_to_size(1, 3)).mul_(2)
        return added((wide * wide).float(), 1) + torch.cat([total[0, :2].detach(), x[0, :1].double()])

    launches = measure(function, torch.randn(5, 6)).forward.launches
    counts = [(each.kernel, sum(each.loaded.values()), sum(each.stored.values())) for each in launches]
    assert counts == [
        ("aten::_to_copy", 120, 240),
        ("aten::sum", 240, 24),
        ("aten::copy_", 24, 24),
        ("aten::mul_", 24, 24),
        ("aten::mul", 240, 240),
        ("aten::_to_copy", 240, 120),
        ("aten::zeros", 0, 12),
        ("add_kernel", 12 + 12, 12),
        ("aten::_to_copy", 4, 8),
        ("aten::cat", 16 + 8, 24),
        ("aten::add", 12 + 24, 24),
    ]


def test_packed_tokens_count_like_separate_tensors() -> None:
    """If q, k and v are views of one packed tensor, the counts are the same as for three separate tensors."""
    packed = torch.randn(1, 50, 3, 2, 32, requires_grad=True)
    projection = orthogonal_projection(20, 32, seed=0)

    def bytes_of(*qkv: Tensor) -> tuple[int, ...]:
        traffic = measure(performer_attention, *qkv, projection, backend="triton")
        return traffic.forward.bytes, traffic.forward.least, traffic.backward.bytes, traffic.backward.least

    views = packed.permute(2, 0, 3, 1, 4).unbind()
    assert bytes_of(*views) == bytes_of(*(x.detach().contiguous().requires_grad_() for x in views))


def test_the_minimum_is_arguments_and_results() -> None:
    """The minimum includes q, k, v and out in the forward pass, and q, k, v, dout, dq, dk and dv in the backward pass.

    In both passes, the minimum includes the random features once, and no softmax statistics.
    """
    traffic = performer(100, 2, 3, 40)
    token_bytes, features = 2 * 3 * 100 * 32 * 2, 40 * 32 * 4
    assert traffic.forward.least == 4 * token_bytes + features
    assert traffic.backward.least == 7 * token_bytes + features  # a tile holds all features, so `out` is not read
    assert loaded_bytes(traffic.forward, "slots") == 2 * [features]


def test_masked_keys_do_not_count() -> None:
    mask = torch.arange(100) < 60
    traffic = performer(100, 2, 3, 40, key_padding_mask=mask.expand(2, 100).contiguous())
    assert loaded_bytes(traffic.forward, "k") == [2 * 3 * 60 * 32 * 2]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_assumed_tiles_of_tokens_do_not_change_traffic(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement runs kernels with larger tiles than a GPU would use.

    This changes neither the launches nor the number of bytes that they load and store.
    """
    options = dict(rope=rope_1d(1000, 32), key_padding_mask=torch.rand(1, 1000) > 0.3, arch=arch)
    large = performer(1000, 1, 1, 70, **options)
    monkeypatch.setattr(launching, "ASSUMED_TOKENS", 0)
    assert performer(1000, 1, 1, 70, **options) == large


# Upper limits of the memory traffic


@pytest.fixture(scope="module")
def long() -> Traffic:
    return performer(4096)


def test_performer_forward() -> None:
    q, k, v = torch.randn(3, 4, 4, 1024, 32, dtype=torch.bfloat16)
    projection = orthogonal_projection(110, 32, seed=0)
    traffic = measure(performer_attention, q, k, v, projection, backend="triton", split=False)
    assert traffic.backward is None and len(traffic.forward.launches) == 2
    assert 1 <= traffic.forward.ratio <= 1.15, f"\n{traffic.forward}"
    split = measure(performer_attention, q, k, v, projection, backend="triton")
    assert len(split.forward.launches) == 3
    # Each of the 4 chunks writes values, lse, running max and sum, and the merge reads all of them except lse. The merged
    # results have the same size as the results without chunks, so they cancel out in the difference.
    rows = 4 * 4 * 110 * 4  # bytes for one number per slot
    assert split.forward.bytes - traffic.forward.bytes == 4 * rows * (32 + 3) + 4 * rows * (32 + 2)


def test_performer_backward(long: Traffic) -> None:
    assert 1 <= long.backward.ratio <= 1.5, f"\n{long.backward}"


def test_nystrom_forward() -> None:
    """The forward pass reads q, k and v twice and writes the output. It takes 4 launches, or 5 if it merges chunks."""
    q, k, v = torch.randn(3, 1, 1, 4096, 32, dtype=torch.bfloat16)
    weight, minimum = torch.randn(1, 1, 33, 1), 7 * q.nbytes
    for split, launches in ((False, 4), (True, 5)):
        options = dict(num_landmarks=64, conv_weight=weight, backend="triton")
        traffic = measure(nystrom_attention, q, k, v, **options, split=split).forward
        assert len(traffic.launches) == launches
        assert 1 <= traffic.bytes / minimum <= 1.25, f"\n{traffic}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_mask_adds_no_launches(dtype: torch.dtype) -> None:
    """Nystrom attention launches 4 Triton kernels in the forward pass and 8 in the backward pass, with and without a mask.

    It runs no PyTorch operators that move data.
    """
    q, k, v, weight = (x.requires_grad_() for x in (*torch.randn(3, 2, 2, 100, 32, dtype=dtype), torch.randn(2, 1, 33, 1)))
    for mask in (None, torch.arange(100) < torch.tensor([[60], [0]])):
        options = dict(num_landmarks=16, conv_weight=weight, key_padding_mask=mask, backend="triton", split=False)
        traffic = measure(nystrom_attention, q, k, v, **options)
        assert len(traffic.forward.launches) == 4 and len(traffic.backward.launches) == 8
        assert all(each.kernel.endswith("_kernel") for each in (*traffic.forward.launches, *traffic.backward.launches))


def test_rope() -> None:
    q, k = torch.randn(2, 4, 8, 1024, 32, dtype=torch.bfloat16, requires_grad=True).unbind()
    traffic = measure(apply_rope, q, k, rope_1d(1024, 32), backend="triton")
    assert 1 <= traffic.forward.ratio <= 1.04, f"\n{traffic.forward}"
    assert 1 <= traffic.backward.ratio <= 1.04, f"\n{traffic.backward}"


# Errors and cleanup


def test_unsupported_measurements_are_refused() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="arch: expected one of sm_80, .*, got 'sm_75'"):
        measure(added, x, arch="sm_75")
    with pytest.raises(ValueError, match="expected tensors on the CPU, .* got one on meta"):
        measure(added, x.to("meta"))
    with pytest.raises(ValueError, match="launched none"):
        measure(torch.sum, x)
    with pytest.raises(Exception, match="atomics are not watched"):
        measure(lambda x: launch(count_kernel, (1,), x), torch.zeros(1, dtype=torch.int32))


def test_an_access_outside_the_arguments_raises() -> None:
    def far(x: Tensor) -> None:
        launch(add_kernel, (1,), x, x, 1, 0, 60, BLOCK=64)

    with pytest.raises(Exception, match="is not within one argument's storage"):
        measure(far, torch.randn(40))
    assert conditions.current == conditions.Conditions()
    assert "create_masked_load" not in vars(interpreter_builder)


def test_the_traffic_command(capsys: pytest.CaptureFixture) -> None:
    from vix_kernels.__main__ import main

    assert main(["dev", "traffic", "--batch", "1", "--heads", "1", "--tokens", "64", "--all-gradients", "--arch", "sm_80"]) == 0
    out = capsys.readouterr().out
    assert "performer_attention backward" in out and "aggregate_slots_kernel" in out and "launched as on sm_80" in out
    assert "in total, 1.000 times the minimum" in out  # the line for RoPE
    with pytest.raises(SystemExit):
        main(["dev", "traffic", "--width", "300"])
    assert capsys.readouterr().err == (
        "vix dev traffic: error: performer_attention: backend='triton' cannot run here: "
        "the kernels support head widths 8 to 256, not 300\n"
    )
