"""Tests of ProjectionUpdater, which redraws the random features of performer-pytorch models during training."""

from __future__ import annotations

import copy

import pytest
import torch
from test_patched import built, patched_copy, tokens_for
from torch import Tensor, nn

from vix_kernels.integrations import performer_pytorch as performer_integration


def train(model: nn.Module, steps: int, automatic: bool) -> list[tuple[float, int, Tensor]]:
    """Train a model. For each step, return the loss, the counter of the updater and the first projection."""
    torch.manual_seed(4)
    optimizer, history = torch.optim.SGD(model.parameters(), lr=0.1), []
    updater = model.performer.proj_updater
    for _ in range(steps):
        if not automatic:
            updater.redraw_projections()
        loss = model(tokens_for("PerformerLM")).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        projection = next(x.clone() for name, x in model.named_buffers() if name.endswith("projection_matrix"))
        history.append((loss.item(), updater.calls_since_last_redraw.item(), projection))
    return history


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("reversible", [False, True])
def test_the_projection_updater_redraws_patched_models(reversible: bool, automatic: bool) -> None:
    """In training, a patched model has the same losses and random features as the original model, before and after redraws."""
    options = dict(reversible=reversible, auto_check_redraw=automatic, feature_redraw_interval=2)
    host = built("PerformerLM", **options).double()
    patched = patched_copy(host, "PerformerLM")
    actual, expected = (train(model, 7, automatic) for model in (patched, host))
    for (loss, calls, projection), (host_loss, host_calls, host_projection) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(host_loss, rel=1e-9) and calls == host_calls and torch.equal(projection, host_projection)
    assert [calls for _, calls, _ in actual] == [1, 2, 0, 1, 2, 0, 1]
    assert len({projection.sum().item() for _, _, projection in actual}) >= 3

    before = copy.deepcopy(patched.state_dict())
    patched.eval()
    for _ in range(4):
        patched.performer.proj_updater.redraw_projections()
        with torch.no_grad():
            patched(tokens_for("PerformerLM"))
    patched.train().fix_projection_matrices_()
    for _ in range(4):
        patched.performer.proj_updater.redraw_projections()
    for name, x in patched.state_dict().items():
        assert torch.equal(x, before[name]) or name.endswith("calls_since_last_redraw")


def test_our_projection_updater_matches_the_package() -> None:
    """The updater of this library redraws the features of all modules.

    The updater of performer-pytorch skips the modules of this library.
    """
    package = pytest.importorskip("performer_pytorch", reason="performer_pytorch is not installed")
    ours = nn.Sequential(nn.Linear(2, 2), performer_integration.FastAttention(8), package.FastAttention(8))
    updater, host = performer_integration.ProjectionUpdater(ours, 2), package.ProjectionUpdater(ours, 2)
    assert list(updater.state_dict()) == list(host.state_dict())
    updater.load_state_dict(host.state_dict())

    def after(updater: nn.Module) -> tuple[bool, bool, int]:
        before = [module.projection_matrix.clone() for module in ours[1:]]
        updater.redraw_projections()
        changed = [not torch.equal(module.projection_matrix, x) for module, x in zip(ours[1:], before, strict=True)]
        return *changed, updater.calls_since_last_redraw.item()

    assert [after(updater) for _ in range(4)] == [(False, False, 1), (False, False, 2), (True, True, 0), (False, False, 1)]
    assert [after(host) for _ in range(4)] == [(False, False, 1), (False, False, 2), (False, True, 0), (False, False, 1)]
    assert [after(updater.eval()) for _ in range(3)] == [(False, False, 1)] * 3
    updater.train().fix_projections_()
    assert [after(updater) for _ in range(3)] == [(False, False, calls) for calls in (2, 3, 4)]
