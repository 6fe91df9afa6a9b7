"""Tests of dropout on the CPU."""

from __future__ import annotations

import pytest
import torch

from vix_kernels.nn.dropout import Dropout
from vix_kernels.primitives.dropout import dropout
from vix_kernels.testing import kept_for_backward


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_rate_and_scale_match_p(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 1003)
    y = Dropout(p)(x)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    # Adjacent elements are dropped independently, even if one random number determines several of them.
    for step in (1, 2, 3, 4):
        both = ((y[:, :-step] == 0) & (y[:, step:] == 0)).double().mean().item()
        assert abs(both - p * p) < 5e-3


def test_gradients_use_the_mask_of_the_forward_pass() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    y = Dropout(0.5)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * grad)
    assert set(grad.unique().tolist()) == {0.0, 2.0}


def test_repeats_with_the_seed_and_keeps_one_byte_per_element() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(Dropout(0.3)(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert kept_for_backward(Dropout(0.3), (x,)) == x.numel()


def test_rate_one_rate_zero_and_evaluation_mode() -> None:
    x = torch.randn(9, 9)
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.0)(x) is x and Dropout(0.5).eval()(x) is x
    assert torch.equal(dropout(x, 0.0), x)


def test_rates_near_zero_and_one_are_rounded_to_the_nearest_rate_between_them() -> None:
    torch.manual_seed(0)
    x = torch.ones(1024, 1024)
    y = dropout(x, 1 - 1e-6)
    assert 0 < y.count_nonzero() < 50 and y.max() == 2**16  # 16 are expected, so the mean is 1
    assert 0 < (dropout(x, 1e-6) == 0).sum() < 50
