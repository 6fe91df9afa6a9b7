"""Tests of the integration with Hugging Face's kernels package, whose `kernelize` replaces layers in transformers models."""

import pytest
import torch

kernels = pytest.importorskip("kernels", reason="kernels is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vix_kernels.integrations import kernels as integration  # noqa: E402
from vix_kernels.integrations import transformers as patched  # noqa: E402

SIZES = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=32, vocab_size=50, max_position_embeddings=64)
MODELS = {
    "fnet": lambda: transformers.FNetModel(transformers.FNetConfig(**SIZES)),
    "nystromformer": lambda: transformers.NystromformerModel(
        transformers.NystromformerConfig(**SIZES, num_attention_heads=2, segment_means_seq_len=32, num_landmarks=8)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_kernelized_models_give_the_same_outputs(name, mode, monkeypatch):
    torch.manual_seed(0)
    model, ids = MODELS[name]().eval(), torch.randint(2, 50, (2, 32))
    expected = model(ids).last_hidden_state
    integration.register()
    model = kernels.kernelize(model, mode=kernels.Mode[mode], device="cpu")
    calls, forward = [], {"fnet": "fourier_mixing", "nystromformer": "nystrom_attention"}[name]
    op = getattr(patched, forward)
    monkeypatch.setattr(patched, forward, lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs))
    out = model(ids).last_hidden_state
    assert len(calls) == 2
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_fnet_layers_with_tpu_matrices_are_not_replaced():
    pytest.importorskip("scipy", reason="scipy is not installed")
    integration.register()
    tpu = dict(use_tpu_fourier_optimizations=True, tpu_short_seq_length=32)
    model, ids = transformers.FNetModel(transformers.FNetConfig(**SIZES, **tpu)).eval(), torch.randint(2, 50, (2, 32))
    expected = model(ids).last_hidden_state
    model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    assert torch.equal(model(ids).last_hidden_state, expected)
