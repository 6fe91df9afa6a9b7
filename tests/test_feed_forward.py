"""Tests that compare the tiled feed-forward network with the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vix_kernels._torch import feed_forward as tiled
from vix_kernels.models import feed_forward as module
from vix_kernels.models.drop_path import DropPath
from vix_kernels.models.feed_forward import Mlp, feed_forward
from vix_kernels.models.layers import TokenBatchNorm
from vix_kernels.nn.dropout import Dropout
from vix_kernels.nn.packed_linear import packed_linear
from vix_kernels.primitives import feed_forward as primitive
from vix_kernels.testing import kept_for_backward


class PlainMlp(Mlp):
    """A subclass of Mlp. `feed_forward` processes tokens in tiles only for Mlp itself."""


def half(norm: type = nn.LayerNorm, activation: type = nn.GELU, mlp: type = Mlp) -> nn.ModuleDict:
    torch.manual_seed(0)
    modules = nn.ModuleDict({"norm": norm(8), "mlp": mlp(8, 24, 0.0, activation), "drop_path": DropPath(0.0)})
    nn.init.normal_(modules["norm"].weight)
    nn.init.normal_(modules["norm"].bias)
    return modules


def run(half: nn.ModuleDict, x: Tensor, renormalise: bool) -> Tensor:
    return feed_forward(x, half["norm"], half["mlp"], half["drop_path"], renormalise)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 7, 8, generator=generator).mul_(2).add_(1).to(dtype).requires_grad_()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return a list that records the arguments of each call to the tiled feed-forward primitive.

    Tiles have 4 tokens per thread. With one thread, the 21 tokens form six tiles, and the last tile has one token.
    """
    monkeypatch.setattr(tiled, "TOKENS_PER_THREAD", 4)
    monkeypatch.setattr(module, "MANY_CPU", 0)
    calls, run = [], primitive.feed_forward
    monkeypatch.setattr(primitive, "feed_forward", lambda *args, **options: calls.append(args) or run(*args, **options))
    return calls


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Hardswish])
@pytest.mark.parametrize("norm", [nn.LayerNorm, TokenBatchNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_plain_form(calls: list, norm: type, activation: type, renormalise: bool, dtype: torch.dtype) -> None:
    results = []
    for kind, wide in ((Mlp, False), (PlainMlp, False), (PlainMlp, True)):
        modules, x = half(norm, activation, kind).to(dtype), tokens(dtype)
        if wide:
            modules, x = modules.double(), x.detach().double().requires_grad_()
        y = run(modules, x, renormalise)
        y.backward(torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype))
        results.append([each.double() for each in (y, x.grad, *(p.grad for p in modules.parameters()))])
    assert len(calls) == 1
    for actual, plain, exact in zip(*results, strict=True):
        error, plain_error = ((each - exact).norm() / exact.norm() for each in (actual, plain))
        assert error <= 2 * plain_error + 4 * torch.finfo(dtype).eps * (dtype != torch.bfloat16)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, TokenBatchNorm])
def test_second_derivatives_equal_the_plain_form(calls: list, norm: type, renormalise: bool) -> None:
    results = []
    for kind in (Mlp, PlainMlp):
        modules, x = half(norm, mlp=kind).double().eval(), tokens(torch.float64)
        (grad,) = torch.autograd.grad(run(modules, x, renormalise).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [x, *modules.parameters()]))
    assert len(calls) == 1
    torch.testing.assert_close(*results)


def test_second_derivatives_of_linear_layers_and_dropout_are_correct() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 12).double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *args: packed_linear(linear, *args), (x,))

    def gradients(forward: Callable) -> tuple[Tensor, ...]:
        parts = torch.cat(forward(x), -1).pow(3).sum()
        first = torch.autograd.grad(parts, [x, *linear.parameters()], create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), [x, *linear.parameters()])

    torch.testing.assert_close(gradients(lambda x: packed_linear(linear, x)), gradients(lambda x: linear(x).chunk(3, -1)))
    y = Dropout(0.5)(x)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 6 * y.detach() * 2 * (y != 0) * 2)


@pytest.mark.parametrize("renormalise", [False, True])
def test_autocast_equals_the_plain_form(calls: list, renormalise: bool) -> None:
    results = []
    for kind in (Mlp, PlainMlp):
        modules, x = half(mlp=kind), tokens()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(modules, x, renormalise)
        y.square().sum().backward()
        assert y.dtype == torch.float32
        results.append((y, x.grad, *(p.grad for p in modules.parameters())))
    assert len(calls) == 1
    for actual, plain in zip(*results, strict=True):
        torch.testing.assert_close(actual, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())


def test_few_tokens_use_the_plain_form(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(half(mlp=PlainMlp), tokens(), False)
    monkeypatch.setattr(module, "MANY_CPU", 3 * 7 * 24 + 1)
    torch.testing.assert_close(run(half(), tokens(), False), plain)
    assert not calls
    monkeypatch.setattr(module, "MANY_CPU", 3 * 7 * 24)
    run(half(), tokens(), False)
    assert len(calls) == 1


def test_only_the_tokens_are_kept_for_backward(calls: list) -> None:
    modules, x = half(), tokens()
    names, parameters = zip(*modules.named_parameters(), strict=True)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return run(modules, x, False)

    assert kept_for_backward(call, (x, *parameters)) == 0


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, TokenBatchNorm])
def test_dropout_equals_the_plain_form_with_the_same_masks(calls: list, norm: type, renormalise: bool) -> None:
    modules, x = half(norm).double(), tokens(torch.float64)
    modules["mlp"].drop.p, modules["drop_path"].rate = 0.25, 0.5
    torch.manual_seed(0)  # this seed drops two of the three samples
    y = run(modules, x, renormalise)
    inner, outer, scales = y.grad_fn.saved_tensors[-3:]
    grads = torch.autograd.grad(y, [x, *modules.parameters()], torch.cos(y.detach()))
    assert 0.5 < inner.float().mean() < 0.95 and 0.5 < outer.float().mean() < 0.95 and len(calls) == 1

    n, mlp = modules["norm"](x), modules["mlp"]
    hidden = mlp.act(mlp.fc1(n)) * inner.view(3, 7, 24) / 0.75
    assert sorted(scales[:, 0, 0].tolist()) == [0, 0, 2]
    plain = (n if renormalise else x) + scales * mlp.fc2(hidden) * outer.view(3, 7, 8) / 0.75
    torch.testing.assert_close(y, plain)
    expected = torch.autograd.grad(plain, [x, *modules.parameters()], torch.cos(y.detach()))
    torch.testing.assert_close(grads, expected)


def hook(modules: nn.ModuleDict) -> None:
    modules["mlp"].fc1.register_forward_hook(lambda module, inputs, output: 2 * output)


def exchange(modules: nn.ModuleDict) -> None:
    modules["mlp"].fc2 = nn.Sequential(modules["mlp"].fc2, nn.Tanh())


def hook_drop_path(modules: nn.ModuleDict) -> None:
    modules["drop_path"].register_forward_hook(lambda module, inputs, output: 2 * output)


def exchange_drop_path(modules: nn.ModuleDict) -> None:
    modules["drop_path"] = nn.Tanh()


@pytest.mark.parametrize("change", [hook, exchange, hook_drop_path, exchange_drop_path])
def test_hooks_and_replaced_layers_use_the_plain_form(calls: list, change: Callable) -> None:
    modules = half()
    plain = run(modules, tokens(), False)
    assert len(calls) == 1
    change(modules)
    torch.manual_seed(0)
    assert not torch.allclose(run(modules, tokens(), False), plain)
    assert len(calls) == 1


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_packed_linear_layer_calls_hooks(everywhere: bool) -> None:
    linear, x, seen = nn.Linear(6, 12), torch.randn(2, 3, 6, requires_grad=True), []

    def note(module: nn.Module, *_: object) -> None:
        seen.append(module)

    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(note)
    else:
        handle = linear.register_full_backward_pre_hook(note)
    with handle:
        torch.cat(packed_linear(linear, x), -1).sum().backward()
    assert seen == [linear]
