"""Tests that plain eager calls bypass the registered operators, that traces contain them, and that vmap and jvp fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from vix_kernels import orthogonal_projection, performer_attention, rope_1d
from vix_kernels.layout import Pool
from vix_kernels.primitives.aggregate import aggregate_forward
from vix_kernels.primitives.landmarks import landmarks_forward
from vix_kernels.primitives.registry import plain
from vix_kernels.testing import SPECS, OpSpec


def performer(backend: str) -> Callable[..., Tensor]:
    projection = orthogonal_projection(8, 16, seed=0).to(DEVICE)
    return lambda q, k, v: performer_attention(q, k, v, projection, backend=backend)


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 20, 16, generator=generator).to(DEVICE) for _ in range(3)]


def test_plain_is_false_under_modes_and_gradients() -> None:
    q = torch.randn(1, 2, 20, 16, device=DEVICE)
    assert plain([q, None, 1.0]) and plain([torch.nn.Parameter(q, requires_grad=False)])
    assert not plain([q.clone().requires_grad_()]) and not plain([q.to("meta")])
    with torch.no_grad():
        assert plain([q.clone().requires_grad_()])
    with torch.inference_mode():
        assert plain([q])
    for mode in (TorchDispatchMode(), TorchFunctionMode(), torch.autocast(DEVICE, torch.bfloat16)):
        with mode:
            assert not plain([q])
    learned = rope_1d(20, 16, device=DEVICE).rotary._replace(cos=torch.zeros(1, 20, 8, device=DEVICE, requires_grad=True))
    assert not plain([q, learned])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_without_gradients_nothing_is_saved_and_results_are_bit_identical(spec: OpSpec) -> None:
    """Without gradients, only the autograd.Function is skipped. One backend is enough, because all backends share this code."""
    problem = spec.problem(spec.cases[0], device=DEVICE)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        plainly = problem(backend="torch")
        assert not saved and not any(out.requires_grad for out in plainly)
        leaves = {name: x.detach().requires_grad_(name in spec.differentiable) for name, x in problem.tensors.items()}
        problem = replace(problem, tensors=leaves)
        recorded = problem(backend="torch")
        assert all(torch.equal(x, y) for x, y in zip(plainly, recorded, strict=True))
        assert any(out.requires_grad for out in recorded)
        saved.clear()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                assert all(torch.equal(x, y) for x, y in zip(plainly, problem(backend="torch"), strict=True))
        assert not saved


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_is_refused(spec: OpSpec, recording: bool) -> None:
    problem = spec.problem(spec.cases[0], device=DEVICE)
    name = spec.differentiable[0]
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        dual = forward_ad.make_dual(problem.tensors[name], torch.ones_like(problem.tensors[name]))
        with pytest.raises(RuntimeError, match="forward mode AD"):
            replace(problem, tensors=problem.tensors | {name: dual})(backend="torch")
        problem(backend="torch")  # calls without a tangent still work


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_transforms_are_refused_without_gradients(spec: OpSpec) -> None:
    problem = spec.problem(spec.cases[0], device=DEVICE)
    name = spec.differentiable[0]
    x = problem.tensors[name]

    def call(x: Tensor) -> Tensor:
        return replace(problem, tensors=problem.tensors | {name: x})(backend="torch")[0]

    with torch.no_grad(), pytest.raises(NotImplementedError, match="torch.func transforms"):
        torch.func.vmap(call)(torch.stack([x, x]))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="torch.func transforms"):
        torch.func.jvp(call, (x,), (x,))


def test_batched_gradients(backend: str) -> None:
    q, k, v = qkv()
    out = performer(backend)(q.requires_grad_(), k, v)
    cotangents = torch.randn(3, *out.shape, device=DEVICE)
    (batched,) = torch.autograd.grad(out, q, cotangents, is_grads_batched=True, retain_graph=True)
    for one, cotangent in zip(batched, cotangents, strict=True):
        assert torch.equal(one, torch.autograd.grad(out, q, cotangent, retain_graph=True)[0])


def test_negative_views_give_the_same_results(backend: str) -> None:
    q, k, v = qkv()
    negated = [torch._neg_view(-x) for x in (q, k, v)]
    assert negated[0].is_neg() and torch.equal(performer(backend)(*negated), performer(backend)(q, k, v))
    out = performer(backend)(q.requires_grad_(), k, v)
    cotangent = torch.randn_like(out)
    direct, lazy = (
        torch.autograd.grad(out, q, each, retain_graph=True)[0] for each in (cotangent, torch._neg_view(-cotangent))
    )
    assert torch.equal(direct, lazy)


def test_traces_contain_the_operators(backend: str) -> None:
    q, k, v = qkv()
    assert torch.equal(torch.jit.trace(performer(backend), (q, k, v), check_trace=False)(q, k, v), performer(backend)(q, k, v))
    for pre_dispatch in (False, True):
        graph = make_fx(performer(backend), pre_dispatch=pre_dispatch)(q, k, v).graph
        assert {"aggregate_forward", "broadcast_forward"} <= {
            getattr(node.target, "_opname", "") for node in graph.nodes if node.op == "call_function"
        }


def test_registered_operators_take_flat_arguments() -> None:
    """Saved programs contain calls to the registered operators, so the schema of a forward operator must not change."""
    q_and_k, masks = "Tensor q, Tensor? k", "Tensor? q_mask, Tensor? k_mask"
    pool = "SymInt prefix, SymInt rows, SymInt mark_rows, SymInt mark_columns, bool adaptive"
    schema = str(landmarks_forward.registered._schema)
    assert f"({q_and_k}, {masks}, Tensor? cos, Tensor? sin, bool interleaved, {pool}, str backend)" in schema
    q, pool = qkv()[0], Pool(0, 1, 1, 4, False)
    rotary = rope_1d(20, 16, device=DEVICE).rotary._replace(angles=None)
    for arguments in ((q, None, None, None, None, pool, "torch"), (q, q, None, None, rotary, pool, "torch")):
        flat = landmarks_forward.flat(arguments)
        assert len(flat) == 13 and landmarks_forward.grouped(flat) == arguments
        results = landmarks_forward(*arguments), landmarks_forward.registered(*flat)
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_an_operator_call_that_would_lose_a_gradient_is_refused(backend: str) -> None:
    q, k, v = qkv()
    slots = orthogonal_projection(8, 16, seed=0).to(DEVICE)[None, None]
    rotary = rope_1d(20, 16, device=DEVICE).rotary
    learned = rotary._replace(cos=rotary.cos.clone().requires_grad_())
    for inputs in ((slots, k.clone().requires_grad_(), v, None, rotary), (slots, k, v, None, learned)):
        with pytest.raises(RuntimeError, match="aggregate_forward has no gradient"):
            aggregate_forward(*inputs, 0.25, True, backend)
