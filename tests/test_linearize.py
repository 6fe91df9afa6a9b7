"""Tests of `linearize`, which converts trained models to linear-cost attention."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import converting
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from vix_kernels.__main__ import main
from vix_kernels.integrations import zoo
from vix_kernels.integrations.hosts import Snapshot
from vix_kernels.integrations.swap import holders, host_of, replace_attention
from vix_kernels.linearize import batches as batches_of_linearize
from vix_kernels.linearize import convert, linearize, load_linearized, save_linearized, state, transfer
from vix_kernels.models import create_model, save_model
from vix_kernels.nn import Attention
from vix_kernels.nn.softmax import Softmax
from vix_kernels.training.trained import load_trained

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, num_heads=2, depth=2, num_classes=7
    )


def hf_vit() -> nn.Module:
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=4)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=7))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 64, 0.0, batch_first=True), 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vix_kernels": (converting.small_model, (3, 32, 32)),
    "timm": (timm_vit, (3, 32, 32)),
    "transformers": (hf_vit, (3, 32, 32)),
    "torch.nn": (encoder, (40, 64)),
}


def make(name: str) -> tuple[nn.Module, Callable[[], Iterator[Tensor]]]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    return converting.sharpened(build()), converting.batches(*shape)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", MODELS)
def test_features_are_fitted_in_every_host(name: str, tmp_path: Path) -> None:
    """Fitting the features decreases the error and keeps the original weights. A loaded model gives bit-identical outputs."""
    model, batches = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = {"exact_prefix": True}
    report = linearize(model, batches, num_features=16, steps=30, progress=False, **exact)
    assert host_of(model) == name and len(report.converted) == 2 and not report.warnings[1:]
    for layer in report.layers.values():
        assert layer.after < 0.7 * layer.before and layer.tokens == (40 if name == "torch.nn" else 65)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert (report.agreement is None) == (name == "torch.nn")
    assert report.milliseconds and "times as fast as softmax" in str(report)
    report.draw(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    x = next(batches())
    expected = output(model, x)
    save_linearized(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="folder: expected a new folder, or overwrite=True"):
        save_linearized(model, tmp_path / "saved")
    fresh = MODELS[name][0]()
    assert torch.equal(output(load_linearized(tmp_path / "saved", fresh), x), expected)
    if name == "transformers":
        assert load_trained(str(tmp_path / "saved"), torch.device("cpu")).config.model == "ViTForImageClassification"
    if name == "torch.nn":
        with pytest.raises(ValueError, match="model: expected a new TransformerEncoder, because the library of .*, got None"):
            load_linearized(tmp_path / "saved")


@pytest.mark.parametrize("name", ["vix_kernels", "transformers"])
def test_a_saved_model_loads_in_a_new_process(name: str, tmp_path: Path) -> None:
    model, batches = make(name)
    linearize(model, batches, num_features=8, steps=2, progress=False)
    save_linearized(model, tmp_path)
    x = next(batches())
    torch.save((x, output(model, x)), tmp_path / "expected.pt")
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torchvision_operators as operators;"
        "declared = operators.mismatch() and operators.declare();"
        "from vix_kernels.linearize import load_linearized; model = load_linearized(sys.argv[1]);"
        "x, expected = torch.load(sys.argv[1] + '/expected.pt'); torch.set_grad_enabled(False); out = model(x);"
        "assert torch.equal(out if isinstance(out, torch.Tensor) else out.logits, expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_the_choice_to_ignore_dropout_is_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.MultiheadAttention(64, 2, dropout=0.1, batch_first=True)

    model, x = build(), torch.randn(2, 40, 64)
    replace_attention(model, "nystrom", dropout="ignore")
    save_linearized(model, tmp_path)
    loaded = load_linearized(tmp_path, build())
    outputs = [each.train()(x, x, x, need_weights=False)[0] for each in (model, loaded)]
    assert torch.equal(*outputs)


def test_modules_of_this_library_with_dropout_are_replaced_on_request() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Attention(64, num_heads=2, attn_drop=0.1), Attention(64, num_heads=2))

    report = zoo.replace_attention(build(), "nystrom")
    assert report.replaced == ["1"] and report.refused["0"].startswith("attn_drop is 0.1; pass dropout='ignore'")
    model, x = build(), torch.randn(2, 40, 64)
    assert zoo.replace_attention(model, "nystrom", dropout="ignore").replaced == ["0", "1"]
    assert torch.equal(model.train()(x), model.eval()(x))


def test_only_chosen_layers_are_converted() -> None:
    model, batches = make("timm")
    report = linearize(model, batches, layers=["blocks.1*"], num_features=8, steps=2, progress=False)
    assert report.converted == ["blocks.1.attn"]
    assert type(model.blocks[0].attn) is timm.layers.Attention and not hasattr(model.blocks[0].attn, "vix")
    with pytest.raises(ValueError, match=r"layers: expected names of attention layers \(blocks.0.attn, .*, got 'block'"):
        linearize(timm_vit(), batches, layers=["block"])


@pytest.mark.parametrize("name", ["vix_kernels", "timm", "transformers"])
def test_layers_with_a_large_error_keep_softmax(name: str) -> None:
    model, batches = make(name)
    errors = [each.after for each in linearize(make(name)[0], batches, num_features=8, steps=5, progress=False).layers.values()]
    limit = (min(errors) + max(errors)) / 2
    report = linearize(model, batches, num_features=8, steps=5, max_error=limit, progress=False)
    assert [each.after for each in report.layers.values()] == errors
    kept = [name for name, each in report.layers.items() if each.after > limit]
    assert len(report.converted) == 1 and len(kept) == 1 and "keeps" not in kept[0]
    assert kept[0] not in holders(model) or isinstance(holders(model)[kept[0]].core, Softmax)
    assert report.layers[kept[0]].attention.startswith("softmax, because the error exceeds")
    with pytest.raises(ValueError, match="max_error: expected at least the smallest error of a layer"):
        linearize(make(name)[0], batches, num_features=8, steps=5, max_error=1e-9, progress=False)


@pytest.mark.parametrize("op", ["feature", "nystrom", "agent"])
def test_attention_layers_may_receive_a_grid(op: str) -> None:
    model = create_model("vit", mixer="softmax", class_token=False, global_pool="avg", img_size=16, patch_size=4, depth=2)
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"grid_size": (4, 4)}), with_kwargs=True)
    report = linearize(model, lambda: [torch.randn(2, 3, 16, 16)], op=op, steps=2)
    assert len(report.converted) == 2


def test_a_part_of_a_model_keeps_softmax() -> None:
    """All layers of the vision model keep softmax attention. The same holds for a new model created from the configuration."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = sizes | dict(vocab_size=50, bos_token_id=0, eos_token_id=1, max_position_embeddings=12)
    config = transformers.SiglipConfig(text_config=text, vision_config=sizes | dict(image_size=32, patch_size=8))
    torch.manual_seed(0)
    model = converting.sharpened(transformers.SiglipModel(config))
    batch = {"pixel_values": torch.randn(8, 3, 32, 32), "input_ids": torch.randint(2, 50, (8, 12))}
    options = dict(op="nystrom", num_landmarks=4, progress=False)
    errors = {name: each.after for name, each in linearize(copy.deepcopy(model), lambda: [batch], **options).layers.items()}
    limit = min(error for name, error in errors.items() if name.startswith("vision_model.")) * 0.99
    report = linearize(model, lambda: [batch], max_error=limit, **options)
    assert report.converted and all(name.startswith("text_model.") for name in report.converted)
    again = transformers.SiglipModel(model.config)
    again.load_state_dict(model.state_dict())
    assert holders(again).keys() == holders(model).keys() == set(report.converted)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits_per_image, model(**batch).logits_per_image)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert not hasattr(model.config.vision_config, "vix_attention")


@pytest.mark.parametrize("name", ["vix_kernels", "timm"])
def test_landmarks_are_calibrated_without_training(name: str) -> None:
    """Each layer gets the smallest number of landmarks (grid cells or segments) that keeps its error within `max_error`."""
    model, batches = make(name)
    report = linearize(model, batches, op="nystrom", max_error=0.5, progress=False)
    assert report.steps == 0 and all(each.after <= 0.5 for each in report.layers.values())
    assert {holder.core.num_landmarks for holder in holders(model).values()} == {16}
    limit = min(each.after for each in report.layers.values()) / 2
    strict, _ = make(name)
    report = linearize(strict, batches, op="nystrom", max_error=limit, progress=False)
    assert all(each.after <= limit for each in report.layers.values())
    counts = [holder.core.num_landmarks for holder in holders(strict).values()]
    assert set(counts) <= set(transfer.LANDMARKS) and min(counts) > 16


def test_the_error_is_that_of_the_attention() -> None:
    """The reported error equals the relative squared error of the attention output, computed from q, k and v."""
    model, batches = make("vix_kernels")
    report = linearize(model, batches, num_features=8, steps=3, progress=False)
    layer = model.blocks[0].attn
    with torch.no_grad():
        inputs = []
        hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for x in batches():
            model(x)
        hook.remove()
        q, k, v = layer.heads(torch.cat(inputs))
        softmax = nn.functional.scaled_dot_product_attention(q, k, v)
        linear = layer._attend(layer.core, q, k, v, transfer.Tokens(), None)
    difference = (linear - softmax)[:, :, 1:].square().sum() / softmax[:, :, 1:].square().sum()
    assert abs(report.layers["blocks.0.attn"].after / difference.item() - 1) < 1e-4
    torch.testing.assert_close(linear[:, :, :1], softmax[:, :, :1])


def test_class_rows_that_are_not_exact_have_a_larger_weight() -> None:
    model, batches = make("vix_kernels")
    report = linearize(model, batches, num_features=8, steps=3, exact_prefix=False, progress=False)
    assert "exact" not in report.layers["blocks.0.attn"].attention
    out, target = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    layer = transfer.Layer("", holders(model)["blocks.0.attn"], [model.blocks[0].attn.core], prefix_tokens=1)
    call = transfer.Call(None, out, out, out, None, None, transfer.Tokens(), "auto")
    assert [float(x) for x in transfer.squared(layer, model.blocks[0].attn.core, call, out, target)] == [2 * (32 + 1 + 1)] * 2


def test_features_are_initialized_from_valid_tokens() -> None:
    """Test padding at the front, at the end and in between, and samples without valid tokens."""
    model, _ = make("vix_kernels")
    name, holder = next(iter(holders(model).items()))
    replace_attention(model, "feature", num_features=8, retrain=True)
    layer = transfer.Layer(name, holder, [holder.core], prefix_tokens=0)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0] * 5], dtype=torch.bool)
    q, k = (torch.where(mask[:, None, :, None], torch.randn(4, 2, 5, 16), float("nan")) for _ in range(2))
    call = transfer.Call(None, q, k, k, None, None, transfer.Tokens(mask), "auto")
    transfer.collect(layer, layer.students, call, k)
    (sums,) = layer.sums
    assert sums.isfinite().all()
    chosen = {tuple(each) for each in sums[:, 0].tolist()}
    assert chosen == {tuple((q[i, 0, m] + k[i, 0, n]).tolist()) for i in range(3) for m in range(5) for n in range(5)
                      if mask[i, m] and mask[i, n]}  # fmt: skip
    queries = torch.randn(4, 2, 3, 16)  # cross-attention: only keys are padded
    call = transfer.Call(None, queries, k, k, None, None, transfer.Tokens(mask, self_attention=False), "auto")
    transfer.collect(layer, layer.students, call, k)
    assert layer.sums[1].isfinite().all()
    layer.sums = []
    call = transfer.Call(None, q, k, k, None, None, transfer.Tokens(torch.zeros_like(mask)), "auto")
    transfer.collect(layer, layer.students, call, k)
    with pytest.raises(ValueError, match="batches: expected valid tokens for blocks.0.attn, got a mask that excludes all"):
        transfer.initialize(layer, 0)


def test_results_do_not_depend_on_the_side_of_padding() -> None:
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    tokens, errors = torch.randint(2, 50, (16, 24)), []
    for shift in (0, 16):
        torch.manual_seed(0)
        config = transformers.SiglipTextConfig(**sizes, max_position_embeddings=40)
        model = converting.sharpened(transformers.SiglipTextModel(config))
        batch = {"input_ids": torch.zeros(16, 40, dtype=torch.long), "attention_mask": torch.zeros(16, 40)}
        batch["input_ids"][:, shift : shift + 24], batch["attention_mask"][:, shift : shift + 24] = tokens, 1
        batch["position_ids"] = (torch.arange(40) - shift).clamp(min=0).expand(16, -1)
        report = linearize(model, lambda batch=batch: [batch], num_features=8, steps=0, progress=False)
        errors += [each.after for each in report.layers.values()]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_results_are_reproducible() -> None:
    states = []
    for _ in range(2):
        model, batches = make("vix_kernels")
        linearize(model, batches, num_features=8, steps=5, progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("stop", [0, 3, 7, 11])
def test_a_resumed_conversion_is_bit_identical(stop: int, tmp_path: Path, monkeypatch) -> None:
    """Interrupt feature training or fine-tuning. The resumed conversion gives the same results as an uninterrupted one."""
    monkeypatch.setattr(state, "INTERVAL", 2)
    settings = dict(num_features=8, steps=6, finetune_steps=6, finetune_lr=1e-3, progress=False)
    model, batches = make("vix_kernels")
    expected = linearize(model, batches, **settings)
    interrupted, _ = make("vix_kernels")
    original = {key: value.clone() for key, value in interrupted.state_dict().items()}
    written = state.Progress.after_step
    done = []

    def after_step(self: state.Progress, *arguments: Any) -> None:
        written(self, *arguments)
        done.append(arguments[0])
        if len(done) > stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(state.Progress, "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            linearize(interrupted, batches, output=tmp_path / "out", **settings)
    assert interrupted.state_dict().keys() == original.keys()
    assert all(torch.equal(interrupted.state_dict()[key], value) for key, value in original.items())
    assert type(interrupted.blocks[0].attn.core) is Softmax
    report = linearize(interrupted, batches, output=tmp_path / "out", **settings)
    assert all(torch.equal(interrupted.state_dict()[key], value) for key, value in model.state_dict().items())
    assert report.layers == expected.layers and (report.agreement, report.divergence) == (
        expected.agreement,
        expected.divergence,
    )
    with pytest.raises(ValueError, match="output: .* contains a conversion with different steps, model: use overwrite=True"):
        linearize(converting.small_model(), batches, output=tmp_path / "out", **settings | dict(steps=7))


@pytest.mark.parametrize("name", MODELS)
def test_an_error_leaves_the_model_as_it_was(name: str) -> None:
    model, batches = make(name)
    x = next(batches())
    expected, keys = output(model, x), list(model.state_dict())
    kinds = {key: type(module) for key, module in model.named_modules()}

    def failing() -> Iterator[Tensor]:
        yield from list(batches())[:3]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        linearize(model, failing, num_features=8, steps=9, eval_samples=16, progress=False)
    assert {key: type(module) for key, module in model.named_modules()} == kinds and list(model.state_dict()) == keys
    assert torch.equal(output(model, x), expected)


def test_finetuning_brings_the_output_closer() -> None:
    model, batches = make("vix_kernels")
    settings = dict(num_features=4, steps=5, exact_prefix=False, progress=False)
    plain = linearize(make("vix_kernels")[0], batches, **settings)
    for distill in ("soft", "features"):
        model, _ = make("vix_kernels")
        tuned = linearize(model, batches, finetune_steps=20, finetune_lr=1e-4, distill=distill, **settings)
        assert tuned.divergence < 0.8 * plain.divergence
    with pytest.raises(ValueError, match="distill: expected 'soft' for a model without forward_features"):
        linearize(make("transformers")[0], batches, finetune_steps=1, distill="features", **settings)


@pytest.mark.parametrize("num_classes", [0, 1])
def test_finetuning_reproduces_outputs_that_are_no_class_probabilities(num_classes: int) -> None:
    settings = dict(num_features=4, steps=5, exact_prefix=False, progress=False)
    divergences = []
    for finetune_steps in (0, 60):
        torch.manual_seed(0)
        model = converting.sharpened(create_model("hybrid_vit", patch_size=4, depth=2, num_classes=num_classes))
        report = linearize(model, make("vix_kernels")[1], finetune_steps=finetune_steps, finetune_lr=1e-4, **settings)
        assert report.agreement is None
        divergences.append(report.divergence)
    assert divergences[1] < 0.5 * divergences[0]


def test_batches_may_be_tuples_or_dicts() -> None:
    reports = []
    for wrap in (
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: {"pixel_values": x, "labels": torch.zeros(len(x)).long()},
    ):
        model, batches = make("transformers")
        wrapped = [wrap(x) for x in batches()]
        reports.append(linearize(model, lambda wrapped=wrapped: iter(wrapped), num_features=8, steps=3, progress=False))
    assert reports[0].layers == reports[1].layers == reports[2].layers


def test_under_autocast_and_in_bfloat16() -> None:
    model, batches = make("vix_kernels")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = linearize(model, batches, num_features=8, steps=20, progress=False)
    assert all(each.after < 0.8 * each.before for each in report.layers.values())
    model, batches = make("timm")
    halves = [x.bfloat16() for x in batches()]
    report = linearize(model.to(torch.bfloat16), lambda: iter(halves), num_features=8, steps=20, progress=False)
    assert all(each.after < 0.8 * each.before for each in report.layers.values())
    assert model.blocks[0].attn.vix.query_features.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_inference_mode(name: str) -> None:
    """A model whose weights were created in inference mode can be converted, but not fine-tuned.

    Batches created in inference mode can be used in all stages.
    """
    settings = dict(num_features=8, steps=2, progress=False)
    model, batches = make(name)
    expected = linearize(model, batches, **settings).layers
    with torch.inference_mode():
        model, _ = make(name)
        data = [x.clone() for x in batches()]
        assert linearize(model, lambda: iter(data), **settings).layers == expected
    model, _ = make(name)
    linearize(model, lambda: iter(data), finetune_steps=1, **settings)
    with torch.inference_mode():
        model, _ = make(name)
    with pytest.raises(ValueError, match="finetune_steps: expected 0 for weights created in torch.inference_mode, .*, got 1"):
        linearize(model, batches, finetune_steps=1, **settings)
    assert not any("vix" in key for key in model.state_dict())


def test_a_converted_model_compiles() -> None:
    torch._dynamo.reset()
    model, batches = make("timm")
    linearize(model, batches, num_features=8, steps=2, progress=False)
    x = next(batches())
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(("name", "op"), [("timm", "nystrom"), ("transformers", "feature")])
def test_a_saved_model_is_exported_to_onnx(name: str, op: str, tmp_path: Path) -> None:
    """ONNX Runtime reproduces the logits of the converted model at a batch size other than that of the export."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: export)")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, batches = make(name)
    if name == "timm":  # a saved folder does not record every argument of timm_vit
        model, batches = converting.sharpened(timm.create_model("test_vit")), converting.batches(3, 160, 160)
    slots = {"feature": "num_features", "nystrom": "num_landmarks"}[op]
    report = linearize(model, batches, op=op, layers=["*.0.*"], steps=2, eval_samples=16, progress=False, **{slots: 16})
    assert len(report.converted) == 1  # exporting more layers takes longer
    save_linearized(model, tmp_path / "saved")
    assert main(["export", "--checkpoint", str(tmp_path / "saved"), "--output", str(tmp_path / "model.onnx")]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = next(batches())[:5]
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), output(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(batches=[1]), "batches: expected a function that returns a fresh iterator, got list"),
        (
            dict(batches=lambda: iter([])),
            "batches: expected a function that returns at least one batch in every call, got none",
        ),
        (dict(batches=lambda: iter(["x"])), "batches: expected tensors, tuples or dicts of tensors, got str"),
        (dict(eval_batches=lambda: iter(["x"])), "eval_batches: expected tensors, tuples or dicts of tensors, got str"),
        (dict(model=nn.Linear(2, 2)), "model: expected nn.MultiheadAttention, got a model without any attention"),
        (dict(steps=-1), "steps: expected an integer >= 0, got -1"),
        (dict(max_error=0), "max_error: expected a finite number > 0, got 0"),
        (dict(distill="hard"), "distill: expected 'soft' or 'features', got 'hard'"),
        (dict(op="softmax"), "op: expected one of"),
        (dict(num_feature=3), "num_feature: expected an option of 'feature'"),
        (dict(layers="blocks"), "layers: expected a list of names or patterns, got 'blocks'"),
        (dict(eval_batches=[1]), "eval_batches: expected a function that returns a fresh iterator, got list"),
        (dict(eval_batches=lambda: iter([])), "eval_batches: expected a function that returns at least one batch, got none"),
        (dict(output=__file__), "output: expected a folder, got .*, which is a file"),
        (dict(op="nystrom", residual_conv_kernel=3), "residual_conv_kernel: expected 0"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: str) -> None:
    model, batches = make("vix_kernels")
    arguments = dict(model=model, batches=batches, progress=False) | change
    with pytest.raises((ValueError, TypeError), match=error):
        linearize(arguments.pop("model"), arguments.pop("batches"), **arguments)
    assert type(model.blocks[0].attn.core) is Softmax


def test_a_number_of_features_that_saves_nothing_is_reported() -> None:
    model, batches = make("vix_kernels")
    report = linearize(model, batches, num_features=70, steps=1, progress=False)
    assert report.warnings[0] == "num_features=70 saves nothing, because there are 65 tokens"


def test_attentions_with_a_bias_are_not_converted() -> None:
    torch.manual_seed(0)
    model = create_model("levit", img_size=32, patch_size=4)
    data = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="it adds a mask or a bias to its logits"):
        linearize(model, lambda: iter([data]), progress=False)


@pytest.mark.parametrize(
    "change, error",
    [
        (
            lambda config: config["layers"]["blocks.0.attn"].update(op="os.system"),
            "layers: expected one of 'agent', .*, got 'os.system'",
        ),
        (
            lambda config: config["layers"]["blocks.0.attn"].update(options=3),
            "layers: expected an op and options for blocks.0.attn",
        ),
        (lambda config: config["layers"]["blocks.0.attn"]["options"].update(num_features=9), "wrong shape"),
        (lambda config: config["host"].update(name="exec"), "exec"),
        (
            lambda config: config["host"].update(library="os"),
            "model: expected a new VisionTransformer, because the library .* is 'os'",
        ),
        (lambda config: config["host"].update(arguments=3), "host: arguments: expected a mapping, got 3"),
        (lambda config: config.pop("layers"), "expected a host and layers"),
    ],
)
def test_damaged_folders_are_refused(change: Callable[[dict], Any], error: str, tmp_path: Path) -> None:
    model, batches = make("vix_kernels")
    linearize(model, batches, num_features=8, steps=1, progress=False)
    save_linearized(model, tmp_path)
    path = tmp_path / "linearized.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=error):
        load_linearized(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder: expected a folder written by save_linearized, got .*, which has no"):
        load_linearized(tmp_path / "none")


def test_other_models_are_not_overwritten(tmp_path: Path) -> None:
    model, batches = make("vix_kernels")
    save_model(model, tmp_path / "softmax")
    before = (tmp_path / "softmax" / "model.safetensors").read_bytes()
    linearize(model, batches, num_features=8, steps=1, progress=False)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="folder: expected a new folder, got .*softmax, which contains another model"):
            save_linearized(model, tmp_path / "softmax", overwrite=overwrite)
    assert (tmp_path / "softmax" / "model.safetensors").read_bytes() == before
    save_linearized(model, tmp_path / "linear")
    with pytest.raises(ValueError, match="model: expected a new model with softmax attention, got one with replaced attention"):
        load_linearized(tmp_path / "linear", model)


def test_a_conversion_of_other_weights_or_images_is_not_continued(tmp_path: Path) -> None:
    model, batches = make("vix_kernels")
    settings = dict(num_features=8, steps=2, progress=False, output=tmp_path / "out")
    linearize(model, batches, **settings)
    again, _ = make("vix_kernels")
    with torch.no_grad():
        again.blocks[0].mlp.fc1.bias.add_(1)
    with pytest.raises(ValueError, match="contains a conversion with different model: use overwrite=True"):
        linearize(again, batches, **settings)
    again, _ = make("vix_kernels")
    other = [x + 1 for x in batches()]
    with pytest.raises(ValueError, match="contains a conversion with different eval_batches: use overwrite=True"):
        linearize(again, lambda: iter(other), **settings)
    with pytest.raises(ValueError, match="batches: expected the same batches as before the interruption, got others"):
        linearize(again, lambda: iter(other), **settings, eval_batches=batches)
    with pytest.raises(ValueError, match="batches: expected the same batches as before the interruption, got others"):
        linearize(again, lambda: reversed(list(batches())), **settings, eval_batches=batches)
    before = (tmp_path / "out" / "linearize.pt").read_bytes()
    with pytest.raises(ValueError, match="eval_batches: expected a function that returns at least one batch, got none"):
        linearize(again, batches, **settings, eval_batches=lambda: [], overwrite=True)
    assert (tmp_path / "out" / "linearize.pt").read_bytes() == before
    linearize(again, lambda: iter(other), **settings, overwrite=True)


def test_an_architecture_that_differs_is_refused(tmp_path: Path) -> None:
    sizes = dict(img_size=32, patch_size=4, embed_dim=64, num_heads=2, depth=2, num_classes=7)
    model, batches = make("timm")
    linearize(model, batches, op="performer", num_features=8, progress=False)
    save_linearized(model, tmp_path)
    for change in (dict(num_heads=4), dict(act_layer="relu")):
        other = timm.create_model("vit_tiny_patch16_224", **sizes | change)
        with pytest.raises(ValueError, match="model: expected the architecture that .* describes, got another one"):
            load_linearized(tmp_path, other)
        assert not holders(other)
    load_linearized(tmp_path, timm.create_model("vit_tiny_patch16_224", **sizes, proj_drop_rate=0.1))


def test_attention_that_is_already_replaced_is_not_converted() -> None:
    model, batches = make("timm")
    replace_attention(model, "linear", layers=["blocks.0*"], retrain=True)
    report = linearize(model, batches, num_features=8, steps=1, progress=False)
    assert report.converted == ["blocks.1.attn"] and model.blocks[0].attn.vix.op == "linear"
    assert report.refused == {"blocks.0.attn": "its softmax attention is already replaced"}
    with pytest.raises(ValueError, match="model: expected softmax attention, got a model whose attention is already replaced"):
        linearize(model, batches, progress=False)
    model, batches = make("transformers")
    replace_attention(model, "linear", layers=["*.0.*"], retrain=True)
    linearize(model, batches, num_features=8, steps=1, progress=False)
    assert [each.core.name for each in holders(type(model)(model.config)).values()] == ["linear", "feature"]


def test_values_that_are_not_finite_are_refused() -> None:
    model, batches = make("vix_kernels")
    bad = [*batches(), torch.full((16, 3, 32, 32), float("nan"))]
    with pytest.raises(ValueError, match="batches: expected finite values, got an error of blocks.0.attn"):
        linearize(model, lambda: iter(bad), num_features=8, steps=6, progress=False)
    with pytest.raises(ValueError, match="finetune_lr: expected a rate with which training converges"):
        linearize(model, batches, num_features=8, steps=1, finetune_steps=3, finetune_lr=1e20, progress=False)
    assert type(model.blocks[0].attn.core) is Softmax and all(p.isfinite().all() for p in model.parameters())


def test_the_state_of_the_caller_is_kept() -> None:
    """`linearize` does not change gradients or the training mode of modules. It can be called under torch.no_grad().

    Hooks that the caller registered earlier can still be removed.
    """
    model, batches = make("timm")
    model.train()
    calls: list[int] = []
    handle = model.blocks[0].attn.register_forward_hook(lambda *args: calls.append(1))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with torch.no_grad():
        linearize(model, batches, num_features=8, steps=1, finetune_steps=1, progress=False)
    assert all(module.training for name, module in model.named_modules() if "vix" not in name)
    assert model.head.weight.grad.eq(1).all() and model.blocks[0].attn.proj.weight.grad is None
    assert all(p.grad is None for name, p in model.named_parameters() if ".vix." in name)
    handle.remove()
    seen = len(calls)
    model.eval()(next(batches()))
    assert len(calls) == seen


def test_a_snapshot_restores_the_structure() -> None:
    model, batches = make("timm")
    x = next(batches())
    expected, snapshot = output(model, x), Snapshot(model)
    replace_attention(model, "performer", retrain=True)
    assert not torch.equal(output(model, x), expected)
    snapshot.restore()
    assert torch.equal(output(model, x), expected) and not model.patch_embed._forward_hooks


def test_the_report_uses_the_batch_size_of_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits are from scikit-learn")
    model = create_model("hybrid_vit", img_size=8, in_chans=1, patch_size=2, depth=1, num_classes=10)
    save_model(model, tmp_path / "model")
    sizes = []

    def linearize(model: nn.Module, batches: Any, *, eval_batches: Any, **options: Any) -> None:
        sizes.extend([len(x) for x in each()] for each in (batches, eval_batches))
        raise ValueError("stop")

    monkeypatch.setattr(convert, "linearize", linearize)
    command = ["linearize", "--checkpoint", str(tmp_path / "model"), "--dataset", "digits", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*command, "--batch-size", "5", "--images", "10", "--eval-images", "12"])
    assert sizes == [[5, 5], [5, 5, 2]]


# Several processes


def test_two_processes_equal_one(tmp_path: Path) -> None:
    results = []
    for world in (1, 2):
        multiprocessing.spawn(converting.convert_and_save, (world, str(tmp_path)), nprocs=world)
        results.append(torch.load(tmp_path / f"{world}.pt"))
    (one, errors, agreement), (two, errors_two, agreement_two) = results
    assert (one - two).norm() < 1e-5 * one.norm()
    assert all(abs(a - b) < 0.02 * a for a, b in zip(errors, errors_two, strict=True)) and abs(agreement - agreement_two) < 5


def test_batches_that_processes_cannot_divide_are_refused(tmp_path: Path) -> None:
    """All processes raise the same error, and the model keeps its softmax attention.

    The number of tokens per sample may differ between processes.
    """
    multiprocessing.spawn(converting.refuse, (str(tmp_path),), nprocs=2)
    errors = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert errors[0] == errors[1] and errors[0].keys() == converting.REFUSED.keys()
    for case, error in converting.REFUSED.items():
        assert errors[0][case].startswith(error)


# Refused arguments


def test_invalid_arguments_are_refused_before_anything_changes() -> None:
    model, batches = make("timm")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (dict(model=None), "model: expected a torch.nn.Module, got NoneType"),
        (dict(model=make("transformers")[0], finetune_steps=1, distill="features"), "distill: expected 'soft' for a model"),
        (dict(model=timm_vit().bfloat16(), finetune_steps=1), "finetune_steps: expected 0 for torch.bfloat16 weights"),
        (dict(seed=2**64), "seed: expected less than 2\\*\\*63"),
        (dict(op="nystrom", seed="x"), "seed: expected an integer >= 0, got 'x'"),
        (dict(layers=[]), "layers: expected at least one name or pattern"),
        (dict(batches=lambda: None), "batches: expected a function .* iterator, got one that returns NoneType"),
        (dict(eval_batches=lambda: 3), "eval_batches: expected a function .* iterator, got one that returns int"),
        (dict(model=timm_vit().requires_grad_(False), op="nystrom", finetune_steps=1), "whose weights require no grad"),
    )  # fmt: skip
    for changes, message in cases:
        arguments = dict(model=model, batches=batches, steps=2, progress=False) | changes
        with pytest.raises((TypeError, ValueError), match=message):
            linearize(**arguments)
    assert not any(hasattr(module, "vix") for module in model.modules())


def test_features_are_distilled_from_batches_of_dicts() -> None:
    model, batches = make("timm")
    before = model.head.weight.clone(), model.blocks[0].mlp.fc1.weight.clone()
    settings = dict(num_features=8, steps=1, finetune_steps=2, distill="features", progress=False)
    linearize(model, lambda: ({"labels": torch.zeros(len(x)), "x": x} for x in batches()), **settings)
    assert torch.equal(model.head.weight, before[0]) and not torch.equal(model.blocks[0].mlp.fc1.weight, before[1])


def test_weights_are_restored_even_if_the_state_dict_is_filtered() -> None:
    model, batches = make("timm")
    model.register_state_dict_post_hook(lambda module, state, *_: [state.pop(key) for key in list(state) if "head" in key])
    before = [x.clone() for x in model.parameters()]
    calls = []

    def interrupted() -> Iterator[Tensor]:
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return batches()

    with pytest.raises(KeyboardInterrupt):
        linearize(model, interrupted, num_features=8, steps=1, finetune_steps=50, finetune_lr=1e-2, progress=False)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


def test_a_larger_max_error_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make("timm")
    settings = dict(num_features=4, steps=3, output=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="max_error: expected at least the smallest error"):
        linearize(model, batches, max_error=1e-9, **settings)
    steps: list[int] = []
    monkeypatch.setattr(state.Progress, "after_step", lambda *arguments: steps.append(1))
    assert len(linearize(model, batches, max_error=1e9, **settings).converted) == 2 and not steps  # no step was repeated


def test_batches_and_buffers_of_any_layout() -> None:
    x = torch.randn(8, 3, 32, 64)
    labels = torch.zeros(8, 2)[:, 1], torch.tensor(1).expand(8), torch.eye(8).to_sparse(), torch.eye(8).to_sparse_csr()
    for batch in (x[..., ::2], torch.fft.fft2(x[..., :32]).real, *((x[..., :32], each) for each in labels)):
        linearize(timm_vit(), lambda batch=batch: iter([batch]), num_features=4, steps=1, progress=False)
    assert batches_of_linearize.checksum([x[..., ::2]]) == batches_of_linearize.checksum([x[..., ::2].contiguous()])
    model = timm_vit()
    model.register_buffer("ids", torch.zeros(1, 1).expand(3, 5), persistent=False)
    calls: list[int] = []

    def interrupt(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)
    before = model.head.weight.clone()
    with pytest.raises(KeyboardInterrupt):
        linearize(model, lambda: iter([x[..., :32]]), num_features=4, steps=1, finetune_steps=9, progress=False)
    assert torch.equal(model.head.weight, before)


def test_iterables_without_iter_are_accepted() -> None:
    class Ready:
        def __getitem__(self, i: int) -> Tensor:
            if i >= 2:
                raise IndexError
            return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i))

    assert linearize(timm_vit(), lambda: Ready(), num_features=4, steps=3, progress=False).samples == 8
