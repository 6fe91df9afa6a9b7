"""Tests of the integrations with torch.nn and scaled_dot_product_attention."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vix_kernels import nystrom_attention
from vix_kernels.integrations.sdpa import replace_sdpa
from vix_kernels.integrations.torch_nn import replace_mha

EXACT = dict(num_landmarks=16, pinv_iterations=16)  # as many landmarks as there are tokens


def encoder(layers=2, dropout=0.0, batch_first=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers).eval()


def tokens():
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))


def padding():
    """Return a mask for torch.nn, where True means padded.

    The padding is at the end, so that PyTorch could use nested tensors if the replacement did not prevent it.
    """
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[1, 12:] = True
    return mask


@pytest.fixture
def calls(monkeypatch):
    """Return a list with one entry for each call to `DropIn`, which replaces softmax attention."""
    from vix_kernels.integrations.drop_in import DropIn

    recorded = []
    attend = DropIn.__call__
    monkeypatch.setattr(DropIn, "__call__", lambda self, *args, **kwargs: recorded.append(1) or attend(self, *args, **kwargs))
    return recorded


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoders_call_the_replacement(calls, grad, training, masked):
    """After the replacement, PyTorch does not use nested tensors, and does not bypass the module in its inference fast path."""
    model, x = encoder().train(training), tokens()
    options = dict(src_key_padding_mask=padding()) if masked else {}
    with torch.set_grad_enabled(grad):
        expected = model(x, **options)
        keys = list(model.state_dict())
        report = replace_mha(model, "nystrom", **EXACT)
        assert report.replaced == ["layers.0.self_attn", "layers.1.self_attn"] and not report.refused
        assert list(model.state_dict()) == keys
        out = model(x, **options)
    assert len(calls) == 2
    valid = ~padding() if masked else torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(out[valid], expected[valid], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_nystrom_with_all_landmarks_reproduces_multihead_attention(batch_first, bias):
    torch.manual_seed(0)
    host = nn.MultiheadAttention(32, 2, bias=bias, batch_first=batch_first)
    q, k, v = torch.randn(3, 2, 16, 32).unbind()
    inputs = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
    mask, additive = padding(), torch.zeros(2, 16).masked_fill(padding(), float("-inf"))
    expected = [host(*inputs, key_padding_mask=m, need_weights=False)[0] for m in (None, mask)]
    alone = host(*(x[0] for x in (q, k, v)), need_weights=False)[0]
    replace_mha(host, "nystrom", **EXACT)
    out = [host(*inputs, key_padding_mask=m, need_weights=False) for m in (None, mask, additive)]
    assert all(weights is None for _, weights in out)
    for actual, host_out in zip(out, [expected[0], expected[1], expected[1]], strict=True):
        torch.testing.assert_close(actual[0], host_out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(host(*(x[0] for x in (q, k, v)), need_weights=False)[0], alone, atol=1e-3, rtol=1e-3)


def test_cross_attention():
    torch.manual_seed(0)
    host = nn.MultiheadAttention(32, 2, batch_first=True)
    q, memory = torch.randn(2, 16, 32), torch.randn(2, 24, 32)
    replace_mha(host, "performer", retrain=True)
    out, _ = host(q, memory, memory, need_weights=False)
    assert out.shape == (2, 16, 32)


def test_replaced_encoders_train_and_copy():
    model = encoder().train()
    replace_mha(model, "performer", retrain=True, num_features=8)
    assert [layer.self_attn.vix.core.seed for layer in model.layers] == [0, 1]
    model(tokens()).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in model.named_parameters() if "in_proj" in n)
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))


@pytest.mark.parametrize("op", ["nystrom", "feature"])
def test_a_saved_encoder_gives_the_same_outputs(op, tmp_path):
    model = encoder()
    replace_mha(model, op, retrain=True, **{"num_landmarks" if op == "nystrom" else "num_features": 4})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    again = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2).eval()
    replace_mha(again, op, retrain=True, **{"num_landmarks" if op == "nystrom" else "num_features": 4})
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(again(tokens()), model(tokens()))


def test_replaced_encoders_compile():
    model = encoder()
    replace_mha(model, "nystrom", num_landmarks=4)
    expected = model(tokens())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(tokens()), expected)


def test_unsupported_arguments_raise():
    model, x = encoder(dropout=0.1), tokens()
    mha = model.layers[0].self_attn
    replace_mha(model, "nystrom", num_landmarks=4)
    model(x)
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0"):
        model.train()(x)
    mha.eval()
    with pytest.raises(NotImplementedError, match="need_weights: expected False"):
        mha(x, x, x)
    with pytest.raises(NotImplementedError, match="attn_mask: expected None"):
        mha(x, x, x, attn_mask=torch.zeros(16, 16), need_weights=False)
    with pytest.raises(NotImplementedError, match="is_causal: expected False"):
        mha(x, x, x, is_causal=True, need_weights=False)
    with pytest.raises(NotImplementedError, match="biases are not supported"):
        mha(x, x, x, key_padding_mask=torch.ones(2, 16), need_weights=False)
    with pytest.raises(ValueError, match="expected 2 or 3 dimensions"):
        mha(x[None], x[None], x[None], need_weights=False)


def test_dropout_is_ignored_on_request():
    x = tokens()
    torch.manual_seed(0)
    host = nn.MultiheadAttention(32, 2, dropout=0.1, batch_first=True)
    replace_mha(host, "nystrom", num_landmarks=4, dropout="ignore")
    out = [host.train(training)(x, x, x, need_weights=False)[0] for training in (True, False)]
    assert torch.equal(*out)
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind()
    with replace_sdpa("nystrom", dropout="ignore") as swap:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert swap.served == 1 and not swap.fell_back


@pytest.mark.parametrize(
    ("options", "reason"),
    [(dict(kdim=8, vdim=8), "kdim"), (dict(add_bias_kv=True), "add_bias_kv"), (dict(add_zero_attn=True), "add_zero_attn")],
)
def test_unsupported_modules_are_not_replaced(options, reason):
    model = nn.ModuleList([nn.MultiheadAttention(32, 2), nn.MultiheadAttention(32, 2, **options)])
    report = replace_mha(model, "nystrom")
    assert report.replaced == ["0"] and reason in report.refused["1"]
    with pytest.raises(ValueError, match="model: expected nn.MultiheadAttention, got a model without any attention"):
        replace_mha(nn.Linear(2, 2), "nystrom")
    with pytest.raises(ValueError, match="retrain"):
        replace_mha(encoder(), "linear")


def test_sdpa_is_replaced_only_within_the_context():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v)
    with replace_sdpa("nystrom", num_landmarks=4) as swap:
        assert not torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
        scaled = F.scaled_dot_product_attention(q, k, v, scale=0.1)
    torch.testing.assert_close(scaled, nystrom_attention(q, k, v, num_landmarks=4, scale=0.1))
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
    assert swap.served == 2 and not swap.fell_back


def test_sdpa_is_replaced_in_compiled_code():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind()

    @torch.compile(backend="eager")
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    with replace_sdpa("nystrom", num_landmarks=4):
        torch.testing.assert_close(attend(q, k, v), nystrom_attention(q, k, v, num_landmarks=4))
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_sdpa_falls_back_and_counts_the_reasons():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind()
    bias = torch.randn(16, 16)
    calls = [dict(is_causal=True), dict(is_causal=True), dict(attn_mask=bias)]
    expected = [F.scaled_dot_product_attention(q, k, v, **options) for options in calls]
    with replace_sdpa("nystrom") as swap:
        for options, host_out in zip(calls, expected, strict=True):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, **options), host_out)
        F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], dropout_p=0.5)
        assert F.scaled_dot_product_attention(q[0], k[0], v[0]).shape == (2, 16, 8)
        assert F.scaled_dot_product_attention(q[:1], k, v).shape == (2, 2, 16, 8)
    assert swap.served == 0 and sorted(swap.fell_back.values()) == [1, 1, 1, 1, 2]
    assert str(swap).startswith("nystrom(): 0 calls served, 6 fell back to softmax attention\n  2 times: is_causal: expected")
    with pytest.raises(ValueError, match="retrain"):
        replace_sdpa("performer")


def test_sdpa_of_x_transformers_is_replaced():
    x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is not installed")
    torch.manual_seed(0)
    host = x_transformers.ViTransformerWrapper(
        image_size=16, patch_size=4, num_classes=5,
        attn_layers=x_transformers.Encoder(dim=32, depth=2, heads=2, attn_dim_head=16, attn_flash=True),
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    expected = host(images)
    with replace_sdpa("nystrom", num_landmarks=64, pinv_iterations=16) as swap:
        out = host(images)
        out.sum().backward()
    assert swap.served == 2 and not swap.fell_back
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
