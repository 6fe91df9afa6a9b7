"""Tests of the transformers integration, on models built from configurations."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vix_kernels.integrations import transformers as integration  # noqa: E402
from vix_kernels.integrations.sdpa import replace_sdpa  # noqa: E402

BERT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, initializer_range=0.1
)
EXACT = dict(num_landmarks=64, pinv_iterations=16)  # as many landmarks as there are tokens, or more


@pytest.fixture(autouse=True)
def registered():
    integration.register(retrain=True, nystrom=EXACT, performer=dict(num_features=8))


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT | options)
    return transformers.BertModel(config).eval()


def text(tokens=24):
    ids = torch.randint(0, 50, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, 15:] = 0
    return ids, mask


def test_nystrom_with_all_landmarks_reproduces_bert():
    """Padding must be masked. transformers silently drops the mask if an implementation has no mask function."""
    model, (ids, mask) = bert(), text()
    expected = model(ids, attention_mask=mask).last_hidden_state
    padded = model(ids).last_hidden_state
    model.set_attn_implementation("vix_nystrom")
    out = model(ids, attention_mask=mask).last_hidden_state
    valid = mask.bool()
    torch.testing.assert_close(out[valid], expected[valid], atol=1e-3, rtol=1e-3)
    assert (out - padded)[1].abs().max() > 0.01
    out[valid].square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "attention" in n)


def test_prepared_masks_are_accepted():
    model, (ids, mask) = bert(), text()
    model.set_attn_implementation("vix_nystrom")
    expected = model(ids, attention_mask=mask).last_hidden_state
    prepared = mask.bool()[:, None, None]
    assert torch.equal(model(ids, attention_mask=prepared).last_hidden_state, expected)
    with pytest.raises(NotImplementedError, match="attn_mask: expected one row"):
        model(ids, attention_mask=prepared.expand(2, 1, 24, 24).tril())


@pytest.mark.parametrize("op", [op for op in integration.OPS if op != "feature"])
def test_vit_runs_with_every_op(op):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    model.set_attn_implementation(f"vix_{op}")
    out = model(images).last_hidden_state
    assert out.shape == expected.shape and not torch.equal(out, expected)
    if op == "nystrom":
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    out.square().sum().backward()
    assert model.get_parameter("embeddings.patch_embeddings.projection.weight").grad.any()


def test_models_that_ignore_the_interface_get_an_additive_mask():
    config = dict(BERT, max_position_embeddings=64, pad_token_id=1)
    torch.manual_seed(0)
    model = transformers.MPNetModel(transformers.MPNetConfig(**config)).eval()
    ids, mask = text()
    expected = model(ids[1:], attention_mask=mask[1:]).last_hidden_state
    model.config._attn_implementation = "vix_nystrom"  # from_pretrained(attn_implementation=...) does the same
    assert torch.equal(model(ids[1:], attention_mask=mask[1:]).last_hidden_state, expected)


def test_models_compile():
    model, (ids, mask) = bert(), text()
    for op in ("nystrom", "performer"):
        model.set_attn_implementation(f"vix_{op}")
        expected = model(ids, attention_mask=mask).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, attention_mask=mask).last_hidden_state, expected)
        torch._dynamo.reset()


def test_checkpointing_gives_the_same_gradients():
    model, (ids, mask) = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), text()
    model.set_attn_implementation("vix_performer")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(ids, attention_mask=mask).last_hidden_state.square().sum().backward()
        grads.append([each.grad.clone() for each in model.parameters() if each.grad is not None])
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_replace_sdpa_reaches_transformers():
    model, (ids, mask) = bert(attn_implementation="sdpa"), text()
    expected = model(ids).last_hidden_state
    with replace_sdpa("nystrom", **EXACT) as swap:
        torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-3, rtol=1e-3)
        assert swap.served == 2 and not swap.fell_back
        model(ids, attention_mask=mask)  # the model's mask has a row for every query
    assert swap.fell_back.total() == 2


def test_unsupported_arguments_raise():
    ids, mask = text()
    model = bert()
    model.set_attn_implementation("vix_nystrom")
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0"):
        model.train()(ids)
    config = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    causal = transformers.GPT2Model(transformers.GPT2Config(**config))
    causal.set_attn_implementation("vix_nystrom")
    with pytest.raises(NotImplementedError, match="mask_function: expected bidirectional_mask_function"):
        causal(ids, attention_mask=mask)
    q, module = torch.randn(1, 2, 8, 4), torch.nn.Module()
    attend = integration.AttentionInterface()["vix_nystrom"]
    with pytest.raises(NotImplementedError, match="is_causal: expected False"):  # a module without `is_causal` counts as causal
        attend(module, q, q, q, None)
    with pytest.raises(NotImplementedError, match="softcap: expected None, got int"):
        attend(module, q, q, q, None, is_causal=False, softcap=30)
    with pytest.raises(NotImplementedError, match="position_bias: expected None, got Tensor"):
        attend(module, q, q, q, None, is_causal=False, position_bias=torch.zeros(1, 2, 8, 8))
    assert attend(module, q, q, q, torch.zeros(1, 1, 1, 8))[0].shape == (1, 8, 2, 4)  # if there is a mask, is_causal is ignored
    with pytest.raises(NotImplementedError, match="grouped heads are not supported"):
        attend(module, q, q[:, :1], q[:, :1], None, is_causal=False)


def test_dropout_is_ignored_on_request():
    """By default, BERT applies a dropout of 0.1 to attention weights."""
    model, (ids, mask) = bert(hidden_dropout_prob=0.0), text()
    integration.register(nystrom=EXACT | dict(dropout="ignore"))
    model.set_attn_implementation("vix_nystrom")
    out = [model.train(training)(ids, attention_mask=mask).last_hidden_state for training in (True, False)]
    assert model.config.attention_probs_dropout_prob == 0.1 and torch.equal(*out)


def test_ops_without_retrain_are_refused():
    integration.register()
    model, (ids, _) = bert(), text()
    model.set_attn_implementation("vix_nystrom")
    model(ids)
    for op in ("performer", "linear", "agent"):
        model.set_attn_implementation(f"vix_{op}")
        with pytest.raises(ValueError, match=f"retrain: expected True for '{op}'"):
            model(ids)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="linformer: expected options of 'agent', 'feature', 'linear', 'nystrom', 'performer'"):
        integration.register(linformer={})
    with pytest.raises(TypeError, match="num_features: expected an option of 'nystrom'"):
        integration.register(nystrom=dict(num_features=3))


def nystromformer(**options):
    torch.manual_seed(0)
    sizes = dict(segment_means_seq_len=32, num_landmarks=8, max_position_embeddings=64, pad_token_id=1)
    conv = options.pop("conv_kernel_size", 9)
    config = transformers.NystromformerConfig(**BERT | sizes | options)
    vars(config)["conv_kernel_size"] = conv  # the configuration rejects None, but the model supports it
    return transformers.NystromformerModel(config).eval()


@pytest.mark.parametrize("conv", [9, None])
@pytest.mark.parametrize("landmarks", [8, 32])
def test_a_patched_nystromformer_gives_the_same_results(conv, landmarks):
    model = nystromformer(conv_kernel_size=conv, num_landmarks=landmarks)
    patched, (ids, _) = copy.deepcopy(model), text(32)
    report = integration.patch(patched)
    assert len(report.replaced) == 2 and list(patched.state_dict()) == list(model.state_dict())
    actual, expected = patched(ids).last_hidden_state, model(ids).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for out in (actual, expected):
        out.square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(patched.get_parameter(name).grad, p.grad, atol=1e-4, rtol=1e-3)
    assert len(integration.patch(patched).replaced) == 2  # patching twice is harmless


@pytest.mark.parametrize("landmarks", [8, 32])
def test_a_patched_nystromformer_masks_padding(landmarks):
    """Large inputs make attention sharp, so errors in the pseudo-inverse are visible. The mask has one row or 32 equal rows."""
    host = nystromformer(num_landmarks=landmarks).encoder.layer[0].attention.self
    patched = copy.deepcopy(host)
    integration.patch(patched)
    x = 20 * torch.randn(2, 32, 32)
    mask = torch.zeros(2, 1, 1, 32)
    mask[1, ..., 20:] = torch.finfo(torch.float32).min
    expected = host(x, mask)[0]
    assert (expected - host(x)[0]).abs().max() > 0.01
    for form in (mask, mask.expand(2, 1, 32, 32)):
        torch.testing.assert_close(patched(x, form)[0], expected, atol=1e-4, rtol=1e-4)
    if landmarks == 8:
        with pytest.raises(NotImplementedError, match="biases are not supported"):
            patched(x, mask / 1e38)
        with pytest.raises(NotImplementedError, match="the same row for all heads and queries"):
            patched(x, mask.expand(2, 1, 32, 32).tril())


def test_a_patched_nystromformer_returns_the_attentions_of_the_host():
    model = nystromformer()
    patched, (ids, _) = copy.deepcopy(model), text(32)
    integration.patch(patched)
    for actual, expected in zip(
        patched(ids, output_attentions=True).attentions, model(ids, output_attentions=True).attentions, strict=True
    ):
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="hidden_states: expected segment_means_seq_len = 32 tokens, got 24"):
        patched(ids[:, :24])


def test_patch_refuses_subclasses():
    """A subclass may compute something else."""
    model = nystromformer()
    attention = model.encoder.layer[1].attention.self
    attention.__class__ = type("Mine", (type(attention),), {})
    report = integration.patch(model)
    assert report.replaced == ["encoder.layer.0.attention.self"] and type(attention).__name__ == "Mine"
    reason = report.refused["encoder.layer.1.attention.self"]
    assert ".Mine, which is not transformers" in reason and "NystromformerSelfAttention or transformers" in reason


@pytest.mark.parametrize("landmarks", [8, 32])
def test_a_patched_nystromformer_returns_the_attentions_of_padded_batches(landmarks):
    """transformers 5.24 raises an error, because it adds a mask with a row per query to logits with a row per landmark."""
    model, (ids, _) = nystromformer(num_landmarks=landmarks), text(32)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    integration.patch(model)
    for training in (False, True):
        out = model.train(training)(ids, attention_mask=mask, output_attentions=True)
        assert [tuple(each.shape) for each in out.attentions] == [(2, 2, 32, landmarks)] * 2
    expected = model.eval()(ids, attention_mask=mask).last_hidden_state
    out = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    # A mask of one row, which transformers supports, gives the same attention weights.
    layer, x = model.encoder.layer[0].attention.self, model.embeddings(ids)
    additive = torch.zeros(2, 1, 1, 32).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    expected = integration.modeling_nystromformer.NystromformerSelfAttention.forward(layer, x, additive, True)[1]
    assert torch.equal(layer(x, additive.expand(2, 1, 32, 32), True)[1], expected) and torch.equal(out.attentions[0], expected)


def test_a_patched_fnet_gives_the_same_results():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=32, vocab_size=50, max_position_embeddings=64)
    model = transformers.FNetModel(transformers.FNetConfig(**sizes)).eval()
    patched, (ids, _) = copy.deepcopy(model), text(30)
    assert len(integration.patch(patched).replaced) == 2
    actual, expected = patched(ids).last_hidden_state, model(ids).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    actual.square().sum().backward()
    assert patched.get_parameter("embeddings.projection.weight").grad.any()
    pytest.importorskip("scipy", reason="scipy is not installed")
    tpu = dict(use_tpu_fourier_optimizations=True, tpu_short_seq_length=32)
    model = transformers.FNetModel(transformers.FNetConfig(**sizes, **tpu))
    with pytest.raises(ValueError, match="2 times it multiplies by DFT matrices"):
        integration.patch(model)
