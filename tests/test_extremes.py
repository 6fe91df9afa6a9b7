"""Tests of inputs near the limits of a dtype, of NaN in padding, and of second derivatives."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ops import check_budget, dtypes
from torch import Tensor

from conftest import DEVICE
from vix_kernels import (
    agent_attention,
    apply_rope,
    fourier_mixing,
    linear_attention,
    linformer_attention,
    nn,
    nystrom_attention,
    orthogonal_projection,
    performer_attention,
    rope_mixed,
    rope_mixed_frequencies,
)
from vix_kernels.ops.rope import Rope
from vix_kernels.primitives.rotate import angle_gradient
from vix_kernels.testing import SPECS, Case, Problem


def constant(x: Tensor) -> Tensor:
    return x[..., :1, :].expand_as(x).contiguous()


def problem_of(name: str, dtype: torch.dtype, **tokens) -> Problem:
    spec = SPECS[name]
    return spec.problem(
        spec.fit(Case("extreme", **{"batch": 1, "tokens": 40, "features": 16} | tokens)), dtype=dtype, device=DEVICE
    )


SOFTMAX = "performer_attention", "nystrom_attention", "linformer_attention", "agent_attention"


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("spread", [16.0, 1e4, 3e4], ids=lambda spread: f"std{spread:g}")
def test_large_logits_stay_within_the_error_budget(name: str, spread: float, dtype: torch.dtype, backend: str) -> None:
    """The attention weights that the backward pass recomputes are at most 1 and sum to 1, even if the logits are large."""
    check_budget(problem_of(name, dtype, spread=spread), backend)


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("name", SOFTMAX)
def test_constant_tokens_stay_within_the_error_budget(name: str, dtype: torch.dtype, backend: str) -> None:
    problem = problem_of(name, dtype, width=255, heads=1, spread=0.75)
    for each in ("k", "agents"):
        if each in problem.tensors:
            problem.tensors[each] = constant(problem.tensors[each])
    check_budget(problem, backend)


@pytest.mark.parametrize("name", ("performer_attention", "nystrom_attention", "agent_attention"))
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_a_single_key_has_probability_one(name: str, spread: float, backend: str) -> None:
    check_budget(problem_of(name, torch.float32, tokens=1, features=1, spread=spread), backend)


@pytest.mark.parametrize(
    "feature_map, level", [("elu", -92.0), ("elu", -104.0), ("relu", 1e-39), ("relu", 1e-44), ("relu", 1e-30)]
)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_small_features_have_finite_gradients(feature_map: str, level: float, eps: float, backend: str) -> None:
    """In one channel of k, the features are nearly 0 for all tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 16, device=DEVICE) for _ in range(3))
    k[..., 3] = level * (1 + torch.rand(24, device=DEVICE) / 8)

    def grads(dtype: torch.dtype, **how: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = linear_attention(*leaves, feature_map=feature_map, eps=eps, **how)
        return list(torch.autograd.grad(out.square().sum(), leaves))

    for x, exact in zip(grads(torch.float32, backend=backend), grads(torch.float64, backend="reference"), strict=True):
        assert (x - exact).norm() <= 1e-5 * exact.norm()


def test_gradients_are_finite_if_all_features_are_small(backend: str) -> None:
    q, k, v = (torch.rand(1, 1, 24, 16, device=DEVICE).mul_(1e-20).requires_grad_() for _ in range(3))
    grads = torch.autograd.grad(linear_attention(q, k, v, eps=0.0, backend=backend).sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("size", [1e18, 3e19, 1e30])
def test_keys_whose_square_overflows_do_not_count_as_masked(size: float, backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 12, 16, device=DEVICE) for _ in range(3))
    projection = orthogonal_projection(20, 16, seed=0).to(DEVICE)
    for big in (k * size, torch.cat([k[:, :, :6] * size, k[:, :, 6:]], 2)):
        out = performer_attention(q, big, v, projection, backend=backend)
        exact = performer_attention(*(x.double() for x in (q, big, v, projection)), backend="reference")
        assert out.isnan().all() or torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-4)


def calls(mask: Tensor | None, backend: str) -> dict:
    """Return a dict of attention functions by name. Each function takes q, k and v of shape (2, 2, 12, 16)."""
    options = dict(key_padding_mask=mask, backend=backend)
    projection = orthogonal_projection(20, 16, seed=0).to(DEVICE)
    tokens = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    agents = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rope = rope_mixed(3, 4, rope_mixed_frequencies(16, 2, seed=0).to(DEVICE).requires_grad_())
    return {
        "performer": lambda q, k, v: performer_attention(q, k, v, projection, **options),
        "performer_rope": lambda q, k, v: performer_attention(q, k, v, projection, rope=rope, **options),
        "relu": lambda q, k, v: linear_attention(q, k, v, **options),
        "elu": lambda q, k, v: linear_attention(q, k, v, feature_map="elu", **options),
        "linear_projected": lambda q, k, v: linear_attention(q, k, v, projection=projection, rope=rope, **options),
        "nystrom": lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=4, rope=rope, **options),
        "linformer": lambda q, k, v: linformer_attention(q, k, v, tokens, **options),
        "agent": lambda q, k, v: agent_attention(q, k, v, agents, **options),
    }


@pytest.mark.parametrize("name", calls(None, "torch"))
def test_nan_in_padding_reaches_no_gradient(name: str, backend: str) -> None:
    """The gradients of a loss over valid tokens do not depend on the contents of masked tokens."""
    torch.manual_seed(0)
    mask = torch.rand(2, 12, device=DEVICE) > 0.4
    mask[:, 0] = True
    hidden = ~mask[:, None, :, None]
    clean = [torch.randn(2, 2, 12, 16, device=DEVICE) for _ in range(3)]
    attend = calls(mask, backend)[name]
    weight = torch.randn(2, 2, 12, 16, device=DEVICE)

    def grads(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves)
        return out.masked_fill(hidden, 0), *torch.autograd.grad((out.masked_fill(hidden, 0) * weight).sum(), leaves)

    expected = grads([x.masked_fill(hidden, 0.5) for x in clean])
    for fill in (float("nan"), float("inf")):
        for x, y in zip(grads([x.masked_fill(hidden, fill) for x in clean]), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ("agent", "performer", "linear_projected"))
def test_infinity_in_padding_reaches_no_gradient_of_the_slots(name: str, sign: int, backend: str) -> None:
    """Infinite values in masked tokens do not change the gradient of the slots (agents or rows of the projection).

    All slots are positive, so the dot product of such a token and a slot is infinite, not NaN.
    """
    torch.manual_seed(0)
    q, k, v, slots = (torch.rand(1, 2, tokens, 16, device=DEVICE) for tokens in (12, 12, 12, 5))
    mask = torch.arange(12, device=DEVICE)[None] < 9

    def grad(fill: float) -> Tensor:
        tokens = [x.masked_fill(~mask[:, None, :, None], fill) for x in (q, k, v)]
        options = dict(key_padding_mask=mask, backend=backend)
        leaf = slots.clone().requires_grad_()
        if name == "agent":
            out = agent_attention(*tokens, leaf, **options)
        elif name == "performer":
            out = performer_attention(*tokens, leaf[0], **options)
        else:
            out = linear_attention(*tokens, projection=leaf[0], **options)
        return torch.autograd.grad(out[:, :, :9].square().sum(), leaf)[0]

    assert torch.equal(grad(sign * torch.inf), grad(0.5))


def test_queries_without_a_feature_of_any_key_stay_finite_in_float16(backend: str) -> None:
    """If a query and the keys have no positive feature in common, the denominator of the query's output is eps."""
    q, k = (torch.zeros(1, 1, 16, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    q[..., :8], k[..., 8:] = 3, 1
    q[:, :, ::2, 8:] = 1
    leaves = [x.requires_grad_() for x in (q, k, torch.ones_like(k))]
    out = linear_attention(*leaves, backend=backend)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


def test_nan_in_padding_reaches_no_gradient_of_angles(backend: str) -> None:
    x, dx, angles = (torch.randn(1, 2, 6, 8, device=DEVICE) for _ in range(3))
    clean = angle_gradient(x, dx * (torch.arange(6, device=DEVICE) < 4)[:, None], angles[0, :, :, :4].clone(), True, backend)
    x[:, :, 4:] = float("nan")
    dx[:, :, 4:] = 0
    assert torch.equal(angle_gradient(x, dx, angles[0, :, :, :4].clone(), True, backend), clean)


@pytest.mark.parametrize("name", [*calls(None, "torch"), "rope"])
def test_a_gradient_cannot_be_differentiated_again(name: str, backend: str) -> None:
    """An error is raised even if the incoming gradient is constant. The reference backend supports second derivatives."""
    x, k, v = (torch.randn(2, 2, 12, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    rope = rope_mixed(3, 4, rope_mixed_frequencies(16, 2, seed=0).to(DEVICE).requires_grad_())

    def loss(backend: str) -> Tensor:
        if name == "rope":
            return apply_rope(x, k, rope, backend=backend)[0].square().sum()
        return calls(None, backend)[name](x, k, v).sum()

    (grad,) = torch.autograd.grad(loss(backend), x, create_graph=True)
    for leaf in (x, (rope.angles if name == "rope" else k)):
        with pytest.raises(RuntimeError, match="backend='reference' supports second derivatives"):
            torch.autograd.grad(x.sum() + k.sum() + grad.square().sum() + rope.angles.sum(), leaf, retain_graph=True)
    (grad,) = torch.autograd.grad(loss("reference"), x, create_graph=True)
    grad.square().sum().backward()


def test_the_gradient_of_a_linear_map_is_a_constant(backend: str) -> None:
    x = torch.randn(2, 6, 8, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(fourier_mixing(x, backend=backend).sum(), x, create_graph=True)
    assert not grad.requires_grad
    (grad,) = torch.autograd.grad(fourier_mixing(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("name", calls(None, "torch"))
@pytest.mark.parametrize("packed", [False, True], ids=["contiguous", "packed"])
def test_outputs_can_be_changed_in_place(name: str, packed: bool) -> None:
    if packed:
        x = torch.randn(2, 12, 3, 2, 16, device=DEVICE, requires_grad=True)
        q, k, v = x.permute(2, 0, 3, 1, 4)
    else:
        q, k, v = x = [torch.randn(2, 2, 12, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    attend = calls(None, "torch")[name]
    out = attend(q, k, v)
    out += q
    expected = torch.autograd.grad((attend(q, k, v) + q).square().sum(), x)
    for a, b in zip(torch.autograd.grad(out.square().sum(), x), expected, strict=True):
        assert torch.equal(a, b)


def test_changing_an_output_that_backward_reads_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, 12, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = calls(None, "triton")["performer"](q, k, v)
    out += q
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("tokens", [37, 197, 1024])
@pytest.mark.parametrize("name", SPECS)
@dtypes(torch.float32, torch.bfloat16)
def test_cpu_results_are_bit_identical_for_any_batch_size(name: str, tokens: int, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    problem = spec.problem(spec.fit(Case("batch", batch=7, tokens=tokens, heads=3, width=32, features=20)), dtype=dtype)

    def results(batch: int) -> dict[str, Tensor]:
        def part(x: Any) -> Any:
            return x[:batch] if isinstance(x, Tensor) and x.dim() and x.shape[0] == 7 else x

        tensors = {name: part(x).detach() for name, x in problem.tensors.items()}
        options = {name: part(x) for name, x in problem.options.items()}
        leaves = {name: tensors[name].requires_grad_() for name in spec.differentiable if problem.tensors[name].shape[0] == 7}
        outputs = replace(problem, tensors=tensors, options=options)(backend="torch")
        generators = [torch.Generator().manual_seed(i) for i in range(len(outputs))]
        cotangents = [
            torch.randn(out.shape[1:], generator=generator).to(out.dtype).expand_as(out)
            for out, generator in zip(outputs, generators, strict=True)
        ]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        return dict(enumerate(outputs)) | dict(zip(leaves, grads, strict=True))

    expected = results(7)
    for batch in (1, 2):
        for key, x in results(batch).items():
            assert torch.equal(x, expected[key][:batch]), key


@pytest.mark.parametrize("kind", ["attention", "performer", "linear", "nystrom", "linformer", "agent"])
def test_modules_treat_padding_as_zeros(kind: str) -> None:
    """NaN in padded tokens does not affect valid rows or any gradient, including the gradients of the weights."""
    torch.manual_seed(0)
    options = {"nystrom": dict(num_landmarks=4), "linformer": dict(seq_len=12), "agent": dict(num_agents=4)}.get(kind, {})
    module = getattr(nn, "Attention" if kind == "attention" else f"{kind.title()}Attention")(32, 2, **options)
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    clean = torch.randn(2, 12, 32)

    def results(fill: float) -> list[Tensor]:
        x = clean.masked_fill(~mask[..., None], fill).requires_grad_()
        out = module(x, key_padding_mask=mask)[mask]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    for x, y in zip(results(float("nan")), results(0.0), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", SPECS)
def test_the_reference_supports_an_empty_batch(name: str) -> None:
    spec = SPECS[name]
    problem = spec.problem(spec.fit(Case("empty", batch=0)))
    leaves = {each: x.requires_grad_() for each, x in problem.tensors.items() if each in spec.differentiable}
    outputs = problem(reference=True)
    assert all(out.shape[0] == 0 for out in outputs)
    torch.autograd.grad([out.sum() for out in outputs], list(leaves.values()))


@pytest.mark.parametrize("moved", [False, True])
def test_a_mixed_rope_can_be_copied_and_pickled(moved: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = torch.nn.Parameter(rope_mixed_frequencies(16, 2, seed=0))
            self.rope = rope_mixed(3, 4, self.frequencies)
            self.rope = self.rope.to("cpu") if moved else self.rope

    def frequencies_of(rope: Rope) -> torch.Tensor:
        return (rope.remake.args[0] if moved else rope.remake).args[2]

    model = Model()
    buffer = io.BytesIO()
    torch.save(model.rope, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for rope, frequencies in (
        ((copied := copy.deepcopy(model)).rope, copied.frequencies),
        ((again := pickle.loads(pickle.dumps(model.rope))), frequencies_of(again)),
        (loaded, frequencies_of(loaded)),
        (copy.copy(model.rope), model.frequencies),
    ):
        assert torch.equal(rope.cos, model.rope.cos) and torch.equal(rope.sin, model.rope.sin)
        q, k = torch.randn(2, 1, 2, 12, 16).unbind()
        (grad,) = torch.autograd.grad(apply_rope(q, k, rope)[0].square().mul(q).sum(), frequencies)
        assert grad.abs().sum() > 0
