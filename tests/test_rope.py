"""Tests of rotary position embeddings (RoPE): angles, layouts, and the effect on attention."""

from __future__ import annotations

import math

import pytest
import torch

from vix_kernels import Rope, apply_rope, rope_1d, rope_axial, rope_mixed, rope_mixed_frequencies


def test_angles_are_positions_times_frequencies() -> None:
    rope = rope_1d(5, 8, base=100.0, prefix_tokens=2)
    assert (rope.tokens, rope.heads, rope.dim, rope.cos.dtype) == (7, 1, 8, torch.float32)
    for token, position in enumerate([0, 0, 0, 1, 2, 3, 4]):  # the two prefix tokens are not rotated, and positions start at 0
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            assert rope.cos[0, token, i] == pytest.approx(math.cos(angle), abs=1e-7)
            assert rope.sin[0, token, i] == pytest.approx(math.sin(angle), abs=1e-7)


def test_angles_of_distant_tokens_are_exact() -> None:
    """The product of position and frequency is computed in float64. At token 100,000, float32 would be too inaccurate."""
    rope = rope_1d(100_001, 4)
    assert rope.cos[0, -1, 1] == pytest.approx(math.cos(100_000 * 10000.0**-0.5), abs=1e-6)
    assert rope.sin[0, -1, 0] == pytest.approx(math.sin(100_000), abs=1e-6)


def test_axial_angles_are_columns_then_rows() -> None:
    rope = rope_axial(2, 3, 8, prefix_tokens=1)
    assert (rope.tokens, rope.heads, rope.dim) == (7, 1, 8)
    for token in range(6):
        column, row = token % 3, token // 3
        expected = [column, column * 100 ** (-4 / 8), row, row * 100 ** (-4 / 8)]
        torch.testing.assert_close(rope.sin[0, 1 + token], torch.tensor(expected).sin())
    assert (rope.cos[:, 0] == 1).all()


def test_mixed_angles_contain_the_axial_ones() -> None:
    """Axial angles are mixed angles in which half of the frequencies are 0.

    The y frequencies are 0 in the first half of the pairs, and the x frequencies are 0 in the second half.
    """
    frequencies = torch.zeros(2, 1, 4)
    frequencies[0, 0, :2] = frequencies[1, 0, 2:] = 100.0 ** (-torch.arange(0, 8, 4) / 8)
    mixed, axial = rope_mixed(2, 3, frequencies, prefix_tokens=1), rope_axial(2, 3, 8, prefix_tokens=1)
    torch.testing.assert_close(mixed.cos, axial.cos)
    torch.testing.assert_close(mixed.sin, axial.sin)


def test_initial_mixed_frequencies_are_orthogonal() -> None:
    across, down = rope_mixed_frequencies(16, 3, seed=0)
    lengths = 10.0 ** (-torch.arange(0, 16, 4) / 16)
    torch.testing.assert_close((across.square() + down.square()).sqrt(), lengths.repeat(2).expand(3, -1))
    products = across[:, :4] * across[:, 4:] + down[:, :4] * down[:, 4:]
    torch.testing.assert_close(products, torch.zeros(3, 4), atol=1e-6, rtol=0)
    assert torch.equal(across, rope_mixed_frequencies(16, 3, seed=0)[0])
    assert len({round(x, 4) for x in across[:, 0].tolist()}) == 3  # each head has a different direction


def test_low_precision_frequencies_make_float32_angles() -> None:
    frequencies = rope_mixed_frequencies(8, 2, seed=0).bfloat16()
    assert torch.equal(rope_mixed(5, 7, frequencies).cos, rope_mixed(5, 7, frequencies.float()).cos)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_products_depend_only_on_distances(layout: str) -> None:
    rope = rope_1d(12, 8, layout=layout)
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 12, 8).clone() for _ in range(2))
    q, k = apply_rope(q, k, rope)
    products = (q @ k.mT)[0, 0]
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-6, rtol=0)


def test_layouts_differ_by_a_permutation_of_channels() -> None:
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    inter = apply_rope(q, k, rope_1d(6, 8))
    half = apply_rope(q[..., order], k[..., order], rope_1d(6, 8, layout="half"))
    for a, b in zip(inter, half, strict=True):
        torch.testing.assert_close(a[..., order], b)


def test_tables_must_be_float32_without_gradient() -> None:
    cos = torch.ones(1, 4, 2)
    with pytest.raises(TypeError, match="cos: expected float32"):
        Rope(cos.bfloat16(), cos.bfloat16())
    with pytest.raises(ValueError, match="cos: expected a table that requires no gradient"):
        Rope(cos.requires_grad_(), cos.detach())
    with pytest.raises(ValueError, match=r"sin: expected shape .* got \(1, 4, 3\)"):
        Rope(torch.ones(1, 4, 2), torch.ones(1, 4, 3))
