"""Tests of DropIn, which integrations call in place of softmax attention: supported calls, and errors for unsupported calls."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vix_kernels import agent_attention, linear_attention, nystrom_attention, orthogonal_projection, performer_attention
from vix_kernels.integrations.drop_in import OPS, DropIn, padding_of, valid_tokens
from vix_kernels.integrations.hosts import ROOT, Report, Snapshot, replace_each, require, require_call
from vix_kernels.nn.core import CORES, Site
from vix_kernels.nn.performer import random_features

FREE = [op for op in OPS if not CORES[op].made("host").needs_module()]  # ops without parameters, which need no module


def qkv(batch=2, heads=3, tokens=24, width=16):
    torch.manual_seed(0)
    return torch.randn(3, batch, heads, tokens, width, dtype=torch.float64).unbind()


def test_every_op_equals_the_public_function():
    q, k, v = qkv()
    mask = torch.rand(2, 24) < 0.7
    options = dict(scale=0.3, key_padding_mask=mask)
    nystrom = nystrom_attention(q, k, v, num_landmarks=8, **options)
    assert torch.equal(DropIn("nystrom", num_landmarks=8)(q, k, v, **options), nystrom)
    projection = orthogonal_projection(20, 16, seed=5)
    performer = performer_attention(q, k, v, projection, **options)
    assert torch.equal(DropIn("performer", retrain=True, num_features=20, seed=5)(q, k, v, **options), performer)
    linear = linear_attention(q, k, v, feature_map="elu", key_padding_mask=mask)
    assert torch.equal(DropIn("linear", retrain=True, feature_map="elu")(q, k, v, **options), linear)
    agents = q.unflatten(2, (6, 4)).mean(3)
    agent = agent_attention(q, k, v, agents, scale=0.3)
    torch.testing.assert_close(DropIn("agent", retrain=True, num_agents=6)(q, k, v, scale=0.3), agent)


@pytest.mark.parametrize("op", FREE)
def test_sdpa_masks_equal_key_padding_masks(op):
    q, k, v = qkv()
    attention = DropIn(op, retrain=True)
    mask = torch.rand(2, 24) < 0.7
    expected = attention(q, k, v, key_padding_mask=mask)
    for form in (mask[:, None, None], mask[:, None, None].expand(2, 3, 24, 24)):
        assert torch.equal(attention(q, k, v, form), expected)
    shared = attention(q, k, v, key_padding_mask=mask[:1].expand(2, -1))
    for form in (mask[0], mask[:1], mask[:1, None], mask[0].expand(24, 24)):
        assert torch.equal(attention(q, k, v, form), shared)


def test_only_padding_masks_are_accepted():
    key = torch.empty(2, 3, 5, 4)
    for shape in [(5, 5), (2, 1, 5, 5), (3, 1, 5), (1, 1, 1, 1, 5)]:
        with pytest.raises(NotImplementedError, match="attn_mask: expected one row"):
            padding_of(torch.ones(shape, dtype=torch.bool), key)
    with pytest.raises(NotImplementedError, match=r"got int64 \(2, 1, 1, 5\)"):
        padding_of(torch.ones(2, 1, 1, 5, dtype=torch.long), key)
    additive = torch.zeros(2, 1, 1, 5)
    additive[1, ..., 3:] = float("-inf")
    assert torch.equal(padding_of(additive, key), additive[:, 0, 0] == 0)
    with pytest.raises(NotImplementedError, match="biases are not supported"):
        padding_of(additive + 1, key)


def test_additive_masks_mark_valid_tokens():
    lowest = torch.finfo(torch.float32).min
    additive = torch.tensor([0.0, lowest, float("-inf"), -0.0])
    assert valid_tokens(additive).tolist() == [True, False, False, True]
    with pytest.raises(NotImplementedError, match="biases are not supported"):
        valid_tokens(torch.tensor([0.0, -1.0]))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(is_causal=True), "is_causal"),
        (dict(dropout_p=0.1), "dropout_p"),
        (dict(attn_mask=torch.ones(24, dtype=torch.bool), key_padding_mask=torch.ones(2, 24, dtype=torch.bool)), "attn_mask"),
    ],
)  # fmt: skip
def test_unsupported_arguments_are_refused_by_name(arguments, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: expected"):
        DropIn("nystrom")(*qkv(), **arguments)


def test_unsupported_shapes_are_refused():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"4 dimensions each, got shapes \(2, 3, 24, 16\), .*\(3, 24, 16\)$"):
        DropIn("nystrom")(q, k, v[0])
    with pytest.raises(NotImplementedError, match=r"\(3, 1, 1\); grouped heads are not supported"):
        DropIn("nystrom")(q, k[:, :1], v[:, :1], enable_gqa=True)
    assert torch.equal(DropIn("nystrom")(q, k, v, enable_gqa=True), DropIn("nystrom")(q, k, v))  # the heads are not grouped
    with pytest.raises(NotImplementedError, match=r"\(1, 2, 2\); samples are not broadcast"):
        DropIn("nystrom")(q[:1], k, v)
    with pytest.raises(NotImplementedError, match="prefix_tokens: expected fewer than the 1 tokens, got 1"):
        DropIn("agent", retrain=True, prefix_tokens=1)(q[:, :, :1], k, v)
    with pytest.raises(NotImplementedError, match=r"grid_size: expected height \* width = 23 tokens after a prefix of 1"):
        DropIn("nystrom", landmarks="grid", grid_size=(4, 6), prefix_tokens=1)(q, k, v)


OPTIONS = {
    "num_landmarks": ("nystrom", dict(num_landmarks="a"), TypeError, "num_landmarks: expected an integer >= 1, got 'a'"),
    "grid_size": ("agent", dict(grid_size=4), TypeError, r"grid_size: expected \(height, width\), got 4"),
    "seed": ("performer", dict(seed=0.5), TypeError, "seed: expected an integer >= 0, got 0.5"),
    "num_features": ("performer", dict(num_features=0), ValueError, "num_features: expected an integer >= 1, got 0"),
    "feature_map": ("linear", dict(feature_map="tanh"), ValueError, "feature_map: expected .*, got 'tanh'"),
    "landmarks": ("nystrom", dict(landmarks="random"), ValueError, "landmarks: expected .*, got 'random'"),
    "op": (["nystrom"], {}, ValueError, r"op: expected one of .*, 'nystrom', .*, got \['nystrom'\]"),
}


@pytest.mark.parametrize("op, options, kind, message", OPTIONS.values(), ids=OPTIONS)
def test_invalid_options_are_named(op, options, kind, message):
    with pytest.raises(kind, match=message):
        DropIn(op, retrain=True, **options)


def test_ops_that_need_training_require_retrain():
    for op in ("performer", "linear", "agent"):
        with pytest.raises(ValueError, match=f"retrain: expected True for '{op}'"):
            DropIn(op)
        DropIn(op, retrain=True)
    DropIn("nystrom")


def test_dropout_is_ignored_only_on_request():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="^dropout_p: expected 0, got 0.1: .*dropout='ignore'"):
        DropIn("nystrom")(q, k, v, dropout_p=0.1)
    ignoring = DropIn("nystrom", dropout="ignore")
    expected = DropIn("nystrom")(q, k, v)
    for attention in (ignoring, ignoring.mounted(Site(16, 3)), copy.deepcopy(ignoring), pickle.loads(pickle.dumps(ignoring))):
        assert torch.equal(attention(q, k, v, dropout_p=0.1), expected) and repr(attention) == "nystrom(dropout='ignore')"
    for invalid in ("drop", 0.0, None):
        with pytest.raises(ValueError, match=f"dropout: expected 'refuse' or 'ignore', got {invalid!r}"):
            DropIn("nystrom", dropout=invalid)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op: expected one of 'agent', 'feature', .*, got 'linformer' .its"):
        DropIn("linformer")
    with pytest.raises(ValueError, match="got 'softmax'$"):
        DropIn("softmax")
    with pytest.raises(TypeError, match="num_agents: expected an option of 'nystrom' .num_landmarks, landmarks"):
        DropIn("nystrom", num_agents=3)
    with pytest.raises(ValueError, match="backend"):
        DropIn("nystrom", backend="cuda")


def test_with_all_landmarks_nystrom_equals_softmax():
    q, k, v = qkv()
    exact = F.scaled_dot_product_attention(q, k, v)
    close = DropIn("nystrom", num_landmarks=24, pinv_iterations=16)(q, k, v)
    torch.testing.assert_close(close, exact, atol=1e-3, rtol=1e-3)
    # With fewer tokens than landmarks, every token is a landmark.
    assert torch.equal(DropIn("nystrom", num_landmarks=64, pinv_iterations=16)(q, k, v), close)


def test_queries_and_keys_may_differ_in_length():
    q, k, v = qkv()
    mask = torch.rand(2, 24) < 0.7
    for op in FREE:
        out = DropIn(op, retrain=True)(q[:, :, :10], k, v, key_padding_mask=mask)
        assert out.shape == (2, 3, 10, 16) and out.isfinite().all()


def test_each_layer_has_different_random_features():
    performer = DropIn("performer", retrain=True, seed=7)
    assert [performer.mounted(Site(16, 2, layer)).core.seed for layer in range(3)] == [7, 8, 9]


def test_an_attention_with_parameters_needs_a_module():
    attention = DropIn("nystrom", retrain=True, residual_conv_kernel=3)
    for call in (attention.without_module, lambda: attention(*qkv())):
        with pytest.raises(ValueError, match="residual_conv_kernel: expected attention without parameters"):
            call()
    q, k, v = qkv()
    mounted = attention.mounted(Site(q.shape[3], q.shape[1])).to(q.dtype)
    assert mounted(q, k, v).shape == v.shape and [name for name, _ in mounted.named_parameters()] == ["res_conv.weight"]


def test_random_features_outlive_the_mode_they_were_drawn_in():
    q = torch.empty(1, 1, 1, 4)
    with torch.inference_mode():
        first = random_features(q, 9, 1234)
    assert not first.is_inference() and random_features(q, 9, 1234) is first
    assert torch.equal(first, orthogonal_projection(9, 4, seed=1234))
    with FakeTensorMode(allow_non_fake_inputs=True):
        second = random_features(q, 9, 1235)
    assert torch.equal(second, orthogonal_projection(9, 4, seed=1235))
    of_compilers = torch.ops.vix_kernels.random_features(q, 9, 1235)
    assert torch.equal(of_compilers, second) and of_compilers.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("op", FREE)
def test_exports_with_dynamic_shapes(op):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return DropIn(op, retrain=True)(q, k, v)

    tokens = torch.export.Dim("tokens", min=64)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: tokens},) * 3
    program = torch.export.export(Model(), qkv(tokens=100), dynamic_shapes=dynamic)
    for batch, count in ((2, 100), (5, 70)):
        inputs = qkv(batch, tokens=count)
        torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


@pytest.mark.parametrize("op", FREE)
def test_compiles_without_graph_breaks(op):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    attention = DropIn(op, retrain=True)
    twice = DropIn(op, retrain=True).mounted(Site(q.shape[3], q.shape[1], 1))
    compiled = torch.compile(lambda *qkv: attention(*qkv) + twice(*qkv), fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v) + twice(q, k, v))
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_copies_give_the_same_output():
    attention = DropIn("performer", retrain=True, num_features=8)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(*qkv()), attention(*qkv()))


def test_old_or_missing_packages_are_named():
    require("torch", "2.11")
    with pytest.raises(ImportError, match=r"torch: expected version 99 or newer, got 2\."):
        require("torch", "99")
    with pytest.raises(ImportError, match="pip install no-such-package"):
        require("no-such-package", "1")


def test_a_changed_host_signature_is_named():
    class Host(torch.nn.Module):
        def forward(self, x, cache=None):
            return x

    class Replacement(Host):
        def forward(self, x):
            return x

    require_call("torch", Host, Replacement)
    with pytest.raises(ImportError, match=r"torch 2\..*: Host is called with \(x, cache\), expected \(x\)"):
        require_call("torch", Replacement, Host)


class ReadOnly(dict):
    def clear(self):
        raise TypeError("read-only")

    update = clear


def test_a_failed_replacement_is_undone():
    """The second module cannot be adapted. The changes to the first module and to its children are undone."""
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), 2)
    model.settings = ReadOnly(depth=2)  # like the configuration of a diffusers model

    def structure():
        return [
            (type(each), {key: dict(x) for key, x in vars(each).items() if isinstance(x, dict)}) for each in model.modules()
        ]

    def adapt(module):
        module.out_proj.hidden = module.vix
        module.__class__ = type("Adapted", (type(module),), {})
        if module is model.layers[1].self_attn:
            raise KeyboardInterrupt

    before, options = structure(), dict(reason_against=lambda module: "", expected="an encoder", adapt=adapt)
    with pytest.raises(KeyboardInterrupt):
        replace_each(model, DropIn("nystrom"), **options)
    assert structure() == before


def test_restoring_the_model_itself_restores_its_submodules():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    snapshot = Snapshot(model)
    model[0].added = 1
    snapshot.restore([ROOT])
    assert not hasattr(model[0], "added")


def test_reports_list_replaced_and_refused():
    report = Report("nystrom()", {"a": "nystrom, 64 landmarks in segments"}, {"b": "a Swin"})
    assert str(report) == (
        "nystrom(): 1 replaced, 1 not replaced\n  a: nystrom, 64 landmarks in segments\n  b not replaced: a Swin"
    )
    assert report.replaced == ["a"]
    assert report.checked("an attention layer") is report
    with pytest.raises(ValueError, match="model: expected an attention layer, got 2 times a Swin"):
        Report("nystrom()", {}, {"b": "a Swin", "c": "a Swin"}).checked("an attention layer")
    with pytest.raises(ValueError, match="got a model without any attention"):
        Report("nystrom()").checked("an attention layer")
