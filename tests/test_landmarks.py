"""Tests specific to landmark means. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import DEVICE, NO_TRITON
from vix_kernels import backends, rope_axial, rope_mixed
from vix_kernels.layout import LandmarkGradients, Pool
from vix_kernels.primitives.landmarks import landmarks, landmarks_backward, landmarks_reference
from vix_kernels.primitives.rotate import rotate_reference


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("size, count", [(12, 4), (13, 4), (11, 4), (7, 7), (9, 5), (5, 1), (40, 2)])
def test_segments_are_a_partition(backend: str, size: int, count: int) -> None:
    """Compare the landmarks with means computed in a loop that assigns tokens to segments as the published code does."""
    x = tokens(1, 2, size, 8, dtype=torch.float32)
    sums, members = torch.zeros(1, 2, count, 8, device=DEVICE), [0] * count
    short = size // count
    split = (count * (short + 1) - size) * short
    for token in range(size):
        segment = token // short if token < split else split // short + (token - split) // (short + 1)
        sums[:, :, segment] += x[:, :, token]
        members[segment] += 1
    marks, counts = landmarks(x, mark_columns=count, backend=backend)
    assert counts.tolist() == [members] and sum(members) == size and {short, short + 1} >= set(members)
    assert members == sorted(members)
    torch.testing.assert_close(marks, sums / torch.tensor(members, device=DEVICE)[:, None])


@pytest.mark.parametrize("rows, columns, mark_rows, mark_columns", [(5, 7, 3, 4), (6, 6, 3, 2), (7, 5, 7, 3), (1, 23, 1, 9)])
def test_adaptive_windows_match_torch(backend: str, rows: int, columns: int, mark_rows: int, mark_columns: int) -> None:
    """Compare outputs and gradients with `adaptive_avg_pool2d`. There are two prefix tokens."""
    x, cotangent = tokens(2, 2, 2 + rows * columns, 8, dtype=torch.float32), tokens(2, 2, 2 + mark_rows * mark_columns, 8)
    x.requires_grad_()
    images = x[:, :, 2:].mT.unflatten(-1, (rows, columns)).flatten(0, 1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(images, (mark_rows, mark_columns))
    expected = torch.cat([x[:, :, :2], pooled.flatten(-2).unflatten(0, (2, 2)).mT], 2)
    grid = dict(prefix=2, rows=rows, mark_rows=mark_rows, mark_columns=mark_columns)
    marks, _ = landmarks(x, **grid, adaptive=True, backend=backend)
    torch.testing.assert_close(marks, expected)
    (dx,) = torch.autograd.grad(marks, x, cotangent.float())
    torch.testing.assert_close(dx, *torch.autograd.grad(expected, x, cotangent.float()))


def test_grid_segments_are_products_of_axis_segments(backend: str) -> None:
    x = tokens(1, 1, 1 + 5 * 7, 8, dtype=torch.float32)
    marks, counts = landmarks(x, prefix=1, rows=5, mark_rows=2, mark_columns=3, backend=backend)
    image = x[0, 0, 1:].unflatten(0, (5, 7))
    cells = [image[rows, columns] for rows in (slice(2), slice(2, 5)) for columns in (slice(2), slice(2, 4), slice(4, 7))]
    torch.testing.assert_close(marks[0, 0], torch.stack([x[0, 0, 0], *(cell.mean((0, 1)) for cell in cells)]))
    assert counts.tolist() == [[1, *(cell[..., 0].numel() for cell in cells)]]


@pytest.mark.parametrize("adaptive", [False, True])
def test_masked_tokens_have_no_influence(backend: str, adaptive: bool) -> None:
    """q and k have different masks, masked tokens contain NaN, and one landmark has no valid token."""
    q, k = (tokens(2, 2, 13, 8, dtype=torch.float32) + i for i in range(2))
    q_mask = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1], [1] * 13], dtype=torch.bool, device=DEVICE)
    k_mask = q_mask.flip(0, 1)
    for x, mask in ((q, q_mask), (k, k_mask)):
        x.masked_fill_(~mask[:, None, :, None], float("nan")).requires_grad_()
    q_marks, k_marks, q_counts, k_counts = landmarks(
        q, k, mark_columns=5, adaptive=adaptive, q_mask=q_mask, k_mask=k_mask, backend=backend
    )
    spans = [(0, 3), (2, 6), (5, 8), (7, 11), (10, 13)] if adaptive else [(0, 2), (2, 4), (4, 7), (7, 10), (10, 13)]
    assert q_counts[0, 2] == 0
    ones = [torch.ones_like(q_marks)] * 2
    dq, dk = torch.autograd.grad((q_marks, k_marks), (q, k), ones)
    for x, mask, marks, counts, dx in ((q, q_mask, q_marks, q_counts, dq), (k, k_mask, k_marks, k_counts, dk)):
        weights = torch.zeros(2, 13, device=DEVICE)
        for j, (first, last) in enumerate(spans):
            for sample in range(2):
                valid = [token for token in range(first, last) if mask[sample, token]]
                assert counts[sample, j] == len(valid)
                expected = x[sample, :, valid].mean(1) if valid else torch.zeros(2, 8, device=DEVICE)
                torch.testing.assert_close(marks[sample, :, j], expected)
                weights[sample, valid] += 1 / max(1, len(valid))
        torch.testing.assert_close(dx, weights[:, None, :, None].expand_as(dx))


@pytest.mark.parametrize("adaptive", [False, True])
def test_nan_reaches_only_windows_that_contain_it(backend: str, adaptive: bool) -> None:
    x = tokens(1, 1, 1 + 5 * 7, 8, dtype=torch.float32)
    x[0, 0, 1 + 2 * 7 + 2, 3] = float("nan")  # row 2, column 2
    marks, _ = landmarks(x, prefix=1, rows=5, mark_rows=2, mark_columns=3, adaptive=adaptive, backend=backend)
    hit = marks.isnan()
    assert not hit[..., [0, 1, 2, 4, 5, 6, 7]].any()
    reached = [1 + 3 * row + column for row in ([0, 1] if adaptive else [1]) for column in ([0, 1] if adaptive else [1])]
    assert hit[0, 0, :, 3].nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_reference_confines_values_that_are_not_finite(adaptive: bool, value: float) -> None:
    """The reference's landmarks and gradients equal those of `landmarks`, with and without torch.func transforms or tracing."""
    x = tokens(2, 2, 1 + 5 * 7, 8, dtype=torch.float32)
    x[0, 0, 1 + 2 * 7 + 2, 3] = value  # row 2, column 2
    options = dict(prefix=1, rows=5, mark_rows=2, mark_columns=3, adaptive=adaptive)

    def marks(x: Tensor) -> Tensor:
        return landmarks_reference(x, **options)[0]

    expected = landmarks(x.requires_grad_(), **options)[0]
    x_mapped = torch.func.vmap(lambda sample: marks(sample[None])[0])(x)
    for each in (marks(x), x_mapped, torch.jit.trace(marks, x.detach())(x), torch.func.jvp(marks, (x,), (x,))[1]):
        torch.testing.assert_close(each, expected, equal_nan=True)
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (marks(x), x_mapped, expected)]
    for each in (*gradients[:2], torch.func.grad(lambda x: marks(x).sum())(x)):
        torch.testing.assert_close(each, gradients[2])


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rope_rotates_tokens_before_averaging(backend: str, layout: str) -> None:
    q, k = (tokens(1, 2, 1 + 4 * 6, 16, dtype=torch.float32) * (1 + i) for i in range(2))
    rope = rope_axial(4, 6, 16, layout=layout, prefix_tokens=1, device=DEVICE)
    grid = dict(prefix=1, rows=4, mark_rows=2, mark_columns=3)
    marks = landmarks(q, k, **grid, rotary=rope.rotary, backend=backend)
    rotated = (rotate_reference(x, rope.rotary) for x in (q, k))
    torch.testing.assert_close(marks, landmarks(*rotated, **grid, backend=backend))


def test_learned_angles_get_gradients_from_q_and_k(backend: str) -> None:
    dtype = torch.float32 if backend == "triton" and DEVICE == "cuda" else torch.float64
    frequencies = tokens(2, 2, 8, dtype=dtype).requires_grad_()
    q, k = (tokens(2, 2, 1 + 4 * 6, 16, dtype=dtype) * (1 + i) for i in range(2))
    q_mask = torch.rand(2, 25, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.3
    rope = rope_mixed(4, 6, frequencies, prefix_tokens=1)
    options = dict(prefix=1, rows=4, mark_rows=2, mark_columns=3, q_mask=q_mask)

    def gradient(marks: tuple[Tensor, ...]) -> Tensor:
        (grad,) = torch.autograd.grad(marks[0].square().sum() + marks[1].pow(3).sum(), frequencies, retain_graph=True)
        return grad

    expected = gradient(landmarks_reference(q, k, rotary=rope.differentiable, **options))
    torch.testing.assert_close(gradient(landmarks(q, k, rotary=rope.rotary, **options, backend=backend)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_adds_parts_and_other_gradients(backend: str, dtype: torch.dtype) -> None:
    """As in an attention op, the gradient of each landmark is a sum of two parts, whose dtypes may differ.

    Gradients of q and k that do not flow through the landmarks are added to the result.
    """
    q, k = tokens(2, 2, 19, 16, dtype=dtype), tokens(2, 2, 30, 16, dtype=dtype)
    dq_other, dk_other = tokens(2, 19, 2, 16, dtype=dtype).transpose(1, 2), tokens(2, 2, 30, 16, dtype=dtype)
    parts = tokens(2, 2, 6, 16, dtype=torch.float32), tokens(2, 2, 6, 16, dtype=dtype)
    pool = Pool(prefix=1, rows=1, mark_rows=1, mark_columns=5, adaptive=False)
    counts = landmarks(q, k, prefix=1, mark_columns=5, backend=backend)[2:]

    def call(*, q_parts: tuple, k_parts: tuple, others: tuple = (None, None), need_q: bool = True) -> tuple[Tensor, Tensor]:
        gradients = LandmarkGradients(*others, *q_parts, *k_parts)
        return landmarks_backward(gradients, q, k, None, None, None, pool, *counts, (need_q, True), backend)

    summed = (parts[0] + parts[1], None)
    parts_only = [call(q_parts=summed, k_parts=summed)[side].float() for side in range(2)]
    dq, dk = call(q_parts=parts, k_parts=parts[::-1], others=(dq_other, dk_other))
    assert dq.dtype == dk.dtype == dtype
    tolerance = dict(atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(dq.float(), parts_only[0] + dq_other.float(), **tolerance)
    torch.testing.assert_close(dk.float(), parts_only[1] + dk_other.float(), **tolerance)
    none, only = call(q_parts=parts, k_parts=parts[::-1], others=(dq_other, dk_other), need_q=False)
    assert none.numel() == 0 and torch.equal(only, dk)


def test_long_windows_are_summed_in_float32(backend: str) -> None:
    """Each landmark averages about a thousand bfloat16 tokens. A running sum in 16 bits would stop growing."""
    x = torch.full((1, 1, 2001, 16), 1.0, device=DEVICE, dtype=torch.bfloat16)
    marks, counts = landmarks(x, mark_columns=2, backend=backend)
    assert counts.tolist() == [[1000, 1001]] and (marks == 1).all()


def test_unused_landmarks_have_no_gradient(backend: str) -> None:
    q, k = (tokens(1, 2, 12, 16, dtype=torch.float32).requires_grad_() for _ in range(2))
    q_marks, k_marks, *_ = landmarks(q, k, mark_columns=3, backend=backend)
    assert torch.autograd.grad(q_marks.sum(), k, allow_unused=True, retain_graph=True) == (None,)
    dq, dk = torch.autograd.grad(k_marks.sum(), (q, k), allow_unused=True)
    assert dq is None and (dk == 0.25).all()


@NO_TRITON
@pytest.mark.parametrize("adaptive", [False, True])
def test_longest_window_is_the_largest_count(adaptive: bool) -> None:
    from vix_kernels._triton.landmarks import longest_window

    for size in range(1, 30):
        for count in range(1, size + 1):
            _, counts = landmarks_reference(torch.zeros(1, 1, size, 1), mark_columns=count, adaptive=adaptive)
            assert longest_window(size, count, adaptive) == counts.max(), (size, count)


@pytest.mark.skipif(not backends.interpreted(), reason="traffic is counted in Triton's interpreter")
def test_every_byte_is_transferred_once() -> None:
    """The forward pass is one launch, which reads q and k and writes the landmarks. The backward pass is also one launch."""
    from vix_kernels.measure.traffic import measure

    q, k = (torch.randn(1, 2, 530, 32, dtype=torch.float16, requires_grad=True) for _ in range(2))
    traffic = measure(landmarks, q, k, mark_columns=32, backend="triton")
    assert [each.kernel for each in traffic.forward.launches] == ["landmarks_kernel"] and traffic.forward.ratio == 1.0
    assert [each.kernel for each in traffic.backward.launches] == ["landmarks_backward_kernel"]
    assert traffic.backward.ratio < 1.002  # slightly above 1, because the backward pass also reads the saved counts
