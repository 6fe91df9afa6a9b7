"""Tests of `Report.measure`, and of the warning about attention that may be slower than softmax attention."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import converting
import pytest
import torch
from torch import Tensor, nn

from vix_kernels.integrations import swap, zoo
from vix_kernels.integrations.hosts import Report
from vix_kernels.integrations.speed import LayerSpeed, SlowerWarning, Speed, call
from vix_kernels.integrations.swap import Softmaxed, holders
from vix_kernels.integrations.torch_nn import replace_mha
from vix_kernels.linearize import linearize
from vix_kernels.measure import break_even
from vix_kernels.measure.timing import in_turns
from vix_kernels.models import create_model
from vix_kernels.nn import Attention
from vix_kernels.nn.softmax import Softmax

timm = pytest.importorskip("timm", reason="timm is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vix_kernels.integrations import timm as timm_integration  # noqa: E402
from vix_kernels.integrations import transformers as transformers_integration  # noqa: E402


def images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def timm_vit(**options: Any) -> nn.Module:
    sizes = dict(img_size=32, patch_size=4, embed_dim=32, num_heads=2, depth=2, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **sizes | options)


def hf_vit() -> nn.Module:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=4)
    return transformers.ViTModel(transformers.ViTConfig(**sizes))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def zoo_vit() -> nn.Module:
    return create_model("hybrid_vit", img_size=32, patch_size=4, embed_dim=32, num_heads=2, depth=2, num_classes=5)


# host -> (model, replace_attention, batch, number of tokens, whether the number is known before a call)
HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Report], Any, int, bool]] = {
    "timm": (timm_vit, timm_integration.replace_attention, (images(), "label"), 65, True),
    "transformers": (
        hf_vit, transformers_integration.replace_attention, {"pixel_values": images(), "labels": None}, 65, True
    ),
    "torch.nn": (encoder, replace_mha, torch.randn(2, 40, 32), 40, False),
    "vix_kernels": (zoo_vit, zoo.replace_attention, images(), 65, True),
}  # fmt: skip


def build(host: str) -> nn.Module:
    torch.manual_seed(0)
    return converting.sharpened(HOSTS[host][0]())


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        out = call(model, batch)
    return out if isinstance(out, Tensor) else out[0]


def state(model: nn.Module) -> list[Any]:
    """Return everything that a measurement must not change."""
    modules = [
        (name, type(each), each.training, len(each._forward_hooks), len(each._forward_pre_hooks), sorted(vars(each)))
        for name, each in model.named_modules()
    ]
    grids = [copy.deepcopy(each.grid.sizes) for each in holders(model).values() if getattr(each, "grid", None)]
    tensors = [(name, x.clone()) for name, x in model.state_dict().items() if isinstance(x, Tensor)]
    cores = [holder.core for holder in holders(model).values()]
    return [modules, grids, tensors, cores, torch.get_rng_state().clone(), torch.is_grad_enabled()]


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after


@pytest.mark.parametrize("op", ["nystrom", "performer"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_measurement_does_not_change_the_model(host: str, op: str) -> None:
    _, replace, batch, tokens, known = HOSTS[host]
    model = build(host).train()
    list(model.modules())[-1].eval()  # modes may differ between modules
    report = replace(model, op, retrain=True)
    names = report.replaced
    assert len(names) == 2 and report.tokens == (dict.fromkeys(names, tokens) if known else {})
    assert (f", {tokens} tokens" in str(report)) == known
    before = state(model)
    speed = report.measure(batch, rounds=2)
    assert same(before, state(model))
    assert speed is report.speed and report.tokens == dict.fromkeys(names, tokens)
    assert speed.softmax > 0 and speed.replaced > 0 and speed.ratio == speed.replaced / speed.softmax
    for layer in speed.layers.values():
        assert layer.tokens == tokens and layer.ratio == layer.replaced / layer.softmax
        assert 0 < layer.softmax < 100 * speed.softmax  # a loose bound, because other programs may interrupt the measurement
    assert f"the model takes {speed.ratio:.2f} times as long as with softmax attention at {tokens} tokens" in str(report)
    assert len(str(speed).splitlines()) == 4 + bool(speed.note)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_the_baseline_is_the_model_before_the_replacement(host: str, twice: bool) -> None:
    _, replace, batch, _, _ = HOSTS[host]
    model = build(host).eval()
    expected = output(model, batch)
    report = replace(model, "linear", retrain=True)
    if twice and host != "vix_kernels":  # in this library's models, only softmax attention can be replaced
        report = replace(model, "performer", retrain=True)
    replaced = output(model, batch)
    kinds = [type(each) for each in model.modules()]
    softmax = Softmaxed(model, report.replaced)
    for _ in range(2):
        with softmax:
            torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=1e-5)
            changed = [type(each) for each in model.modules()] != kinds
            assert changed == (host in ("timm", "torch.nn"))  # these hosts run their original code
        assert torch.equal(output(model, batch), replaced)
    assert (replaced - expected).abs().max() > 1e-4


def test_models_built_with_an_attention_are_compared_with_softmax() -> None:
    torch.manual_seed(0)
    model = timm_vit(attn_layer="vix_linear").eval()
    report = timm_integration.replace_attention(model, "nystrom")
    with Softmaxed(model, report.replaced):
        assert isinstance(model.blocks[0].attn.vix.core, Softmax)
        expected = output(model, images())
    weights = timm_vit().eval()
    weights.load_state_dict({name: x for name, x in model.state_dict().items() if "_extra_state" not in name})
    torch.testing.assert_close(expected, output(weights, images()), atol=1e-5, rtol=1e-5)
    assert report.measure(images(), rounds=1).ratio > 0


def test_layers_that_keep_softmax_are_not_measured() -> None:
    model = build("timm")
    report = timm_integration.replace_attention(model, "linear", layers=["blocks.1*"], retrain=True)
    assert list(report.measure(images(), rounds=1).layers) == ["blocks.1.attn"]
    assert type(model.blocks[0].attn) is timm.layers.Attention


def test_cross_attention_counts_keys() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, 32, batch_first=True), 1)
    report = replace_mha(model, "linear", layers=["*.multihead_attn"], retrain=True)
    report.measure({"tgt": torch.randn(2, 10, 32), "memory": torch.randn(2, 40, 32)}, rounds=1)
    assert report.tokens == {"layers.0.multihead_attn": 40}


def test_times_are_measured_with_the_given_clock() -> None:
    ticks = iter(range(100))
    times = in_turns({"a": lambda: None, "b": lambda: next(ticks)}, rounds=2, clock=lambda: float(next(ticks)))
    assert times["a"].samples == (1000.0, 1000.0) and times["b"].samples == (2000.0, 2000.0) and times["a"].method == "wall"
    assert in_turns({"a": lambda: None}, rounds=1)["a"].method == "cpu"


def test_short_functions_are_repeated() -> None:
    """The warm-up call takes 2 seconds on the fake clock, so each round of 20 seconds makes 10 calls."""
    ticks, calls = iter(range(100)), []
    times = in_turns({"a": lambda: calls.append(next(ticks))}, rounds=2, seconds=20, clock=lambda: float(next(ticks)))
    assert len(calls) == 1 + 2 * 10 and times["a"].samples == (1100.0, 1100.0)


class Looped(nn.Module):
    """A model that calls `first` with all tokens and then with 16 tokens, and never calls `second`.

    Call number `fails` raises an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(32, num_heads=2), Attention(32, num_heads=2)
        self.norm = nn.BatchNorm1d(32)
        self.calls, self.fails = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x=x)
        if self.calls == self.fails:
            raise RuntimeError("failed")
        return self.norm(self.first(x[:, :16]).mT)


def test_layers_may_be_called_twice_or_never() -> None:
    model = Looped().train()
    report = zoo.replace_attention(model, "linear", retrain=True)
    speed = report.measure(torch.randn(2, 24, 32), rounds=2)
    assert report.tokens == {"first": 24} and speed.layers["second"] == LayerSpeed()
    assert speed.layers["second"].ratio != speed.layers["second"].ratio
    assert "second  not called" in str(speed) and speed.layers["first"].softmax > 0
    assert model.norm.num_batches_tracked == 0 and model.training


@pytest.mark.parametrize("fails", [1, 2, 5, 8])
def test_a_failed_measurement_does_not_change_the_model(fails: int) -> None:
    model, x = Looped().train(), torch.randn(2, 24, 32)
    report = zoo.replace_attention(model, "linear", retrain=True)
    before, model.fails = state(model), fails
    with pytest.raises(RuntimeError, match="failed"):
        report.measure(x, rounds=1)
    assert same(before, state(model)) and report.speed is None


def test_other_image_sizes_do_not_change_the_grid() -> None:
    model = timm_vit(dynamic_img_size=True)
    report = timm_integration.replace_attention(model, "nystrom")
    before = str(report)
    assert report.tokens == dict.fromkeys(report.replaced, 65) and "grid 8 x 8" in before
    report.measure(images(48), rounds=1)
    assert report.tokens == dict.fromkeys(report.replaced, 145)
    assert model.blocks[0].attn.vix.placed().grid_size == (8, 8)


def test_compiled_models_are_measured_without_compilation() -> None:
    model = encoder().eval()
    report = replace_mha(model, "linear", retrain=True)
    graphs = []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    x = torch.randn(2, 40, 32)
    with torch.no_grad():
        expected = model(x)
        count = len(graphs)
        assert count and len(report.measure(x, rounds=1).layers) == 2 and len(graphs) == count
        assert torch.equal(model(x), expected)
    torch._dynamo.reset()


def test_measurements_in_other_modes() -> None:
    model = build("timm")
    report = timm_integration.replace_attention(model, "feature", retrain=True)
    with torch.inference_mode():
        report.measure(images(), rounds=1)
    with torch.autocast("cpu", torch.bfloat16):
        report.measure(images(), rounds=1)
    model.to(torch.bfloat16)
    assert "bfloat16, batch size 3" in str(report.measure(images(batch=3).bfloat16(), rounds=1))
    model.train()(images().bfloat16()).sum().backward()


def test_invalid_measurements_are_refused() -> None:
    model = build("timm")
    report = timm_integration.replace_attention(model, "nystrom")
    for rounds in (0, 1.5):
        with pytest.raises((TypeError, ValueError), match="rounds: expected an integer >= 1"):
            report.measure(images(), rounds=rounds)
    for batch in (None, [], {"x": 3}, torch.tensor(3.0)):
        with pytest.raises(TypeError, match="batch: expected a tensor, or a tuple or dict of tensors, got"):
            report.measure(batch)
    timm_integration.restore_attention(model)
    with pytest.raises(ValueError, match="report: expected the report of a model whose softmax attention is replaced"):
        report.measure(images())
    with torch.device("meta"):
        empty = timm_vit()
    with pytest.raises(ValueError, match="model: expected a model with weights, got one on the meta device"):
        timm_integration.replace_attention(empty, "nystrom").measure(images())
    config = transformers.FNetConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=9)
    with pytest.raises(ValueError, match=r"got one without replaced attention \(Nystromformer and FNet\)"):
        transformers_integration.patch(transformers.FNetModel(config)).measure(images())


def test_a_report_of_changed_layers_is_refused() -> None:
    model = timm_vit()
    report = timm_integration.replace_attention(model, "nystrom", num_landmarks=4)
    copied = pickle.loads(pickle.dumps(report))
    assert copied == report and len(pickle.dumps(report)) < 5_000 and "model" not in dataclasses.asdict(report)
    with pytest.raises(ValueError, match="report: expected the report of a model"):
        copied.measure(images())
    with pytest.raises(ValueError, match="batch: expected at least one sample, got none"):
        report.measure(images(batch=2)[:0])
    timm_integration.replace_attention(model, "linear", retrain=True)
    with pytest.raises(ValueError, match="one in which blocks.0.attn was changed"):
        report.measure(images())
    timm_integration.replace_attention(model, "nystrom")
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(ValueError, match="one in which blocks.1.attn was changed"):
        report.measure(images())


def test_diffusers_models_are_measured() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import DiTTransformer2DModel

    from vix_kernels.integrations.diffusers import replace_attention

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=16, num_embeds_ada_norm=10
    )
    report = replace_attention(model, "nystrom", num_landmarks=16)
    batch = {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([1]), "class_labels": torch.tensor([3])}
    assert report.measure(batch, rounds=1).layers["transformer_blocks.0.attn1"].tokens == 64


def test_a_slower_attention_causes_a_warning() -> None:
    length = break_even.slower("nystrom", 65, 32, "cpu").rounded
    with pytest.warns(SlowerWarning, match="nystrom attention may be slower than softmax attention at 65 tokens") as caught:
        report = timm_integration.replace_attention(timm_vit(), "nystrom")
    (warning,) = caught
    assert warning.filename == __file__ and "\n" not in str(warning.message) and f"warning: {warning.message}" in str(report)
    assert f"at head width 32, nystrom attention was faster from about {length} tokens (" in str(report)
    speed = report.measure(images(), rounds=1)
    assert "warning" not in str(report) and bool(speed.note) == (speed.ratio > 1)
    for host in ("transformers", "vix_kernels"):
        model = build(host)
        with pytest.warns(SlowerWarning, match="at 65 tokens") as caught:
            HOSTS[host][1](model, "nystrom")
        assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("host", ["timm", "transformers", "vix_kernels"])
def test_a_warning_that_is_an_error_leaves_the_model_unchanged(host: str) -> None:
    model = build(host)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerWarning)
        with pytest.raises(SlowerWarning):
            HOSTS[host][1](model, "nystrom")
    assert same(before, state(model))


def test_other_attentions_cause_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerWarning)
        timm_integration.replace_attention(timm_vit(), "nystrom", num_landmarks=4)  # the table does not cover 4 landmarks
        timm_integration.replace_attention(timm_vit(patch_drop_rate=0.5), "nystrom")  # the number of tokens is unknown
        timm_integration.replace_attention(timm_vit(img_size=128), "nystrom")  # 1,025 tokens
        replace_mha(encoder(), "nystrom")
        swap.replace_attention(timm_vit(), "nystrom")
        with torch.device("meta"):
            model = timm_vit()
        timm_integration.replace_attention(model, "nystrom")
        linearize(timm_vit(), lambda: [images()], steps=1, progress=False)


@pytest.mark.parametrize("name", ["mae", "swin", "bert"])
def test_the_number_of_tokens_is_unknown_if_it_differs_between_layers(name: str) -> None:
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    vision = dict(image_size=32, patch_size=4)
    if name == "mae":
        model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, **vision))
    elif name == "swin":
        model = transformers.SwinModel(
            transformers.SwinConfig(**vision, embed_dim=32, depths=[1], num_heads=[2], window_size=4)
        )
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=9))
    assert transformers_integration.count_tokens(model) is None
    if name == "mae":
        report = transformers_integration.replace_attention(model, "nystrom")
        report.measure(images(), rounds=1)
        assert set(report.tokens.values()) == {17}  # a quarter of the patches, and the class token


def test_the_result_is_printed_as_a_table() -> None:
    layers = {"a": LayerSpeed(197, 1.0, 1.5), "bc": LayerSpeed(50, 2.0, 1.0), "d": LayerSpeed()}
    assert str(Speed(10.0, 13.1, layers, "CPU, float32, batch size 2", "note")) == (
        "layer  tokens  softmax, ms  replaced, ms  ratio\n"
        "a         197        1.000         1.500   1.50\n"
        "bc         50        2.000         1.000   0.50\n"
        "d      not called\n"
        "the model takes 1.31 times as long as with softmax attention at 50 to 197 tokens (13.10 and 10.00 ms; CPU, float32, "
        "batch size 2)\n"
        "note"
    )
