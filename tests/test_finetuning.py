"""Tests of `vix train` with pretrained weights, with timm models, and with a teacher."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vix_kernels.__main__ import main
from vix_kernels.integrations.linearized import save_linearized
from vix_kernels.integrations.swap import replace_attention
from vix_kernels.models import create_model, save_model
from vix_kernels.training.checkpoint import load_checkpoint
from vix_kernels.training.config import Config, UserError
from vix_kernels.training.hosts import HostModel
from vix_kernels.training.initial import load_initial
from vix_kernels.training.optim import Optimizer, layer_scales
from vix_kernels.training.teacher import distance, heads
from vix_kernels.training.trained import load_trained

pytest.importorskip("sklearn", reason="the digits are from scikit-learn")
SMALL = ("--dataset", "digits", "--epochs", "1", "--batch-size", "256", "--warmup-epochs", "0", "--no-progress")
TINY = ("--model", "hybrid_vit", "--model-kwargs", "depth=2", "embed_dim=32", "num_heads=2")


def train(*arguments: object) -> None:
    assert main(["train", *SMALL, *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(*TINY, "--output", folder)
    return folder


def tiny(**options: object) -> nn.Module:
    return create_model("hybrid_vit", img_size=8, patch_size=2, in_chans=1, depth=2, embed_dim=32, num_heads=2, **options)


def test_a_run_continues_from_its_weights_with_another_attention(run: Path, tmp_path: Path) -> None:
    """With a learning rate near 0, the weights that occur in both models stay equal to those of the first run."""
    train("--model", "hybrid_vip", *TINY[2:], "--initial-checkpoint", run, "--lr", "1e-30", "--output", tmp_path / "new")
    old, new = (load_checkpoint(folder)["model"] for folder in (run / "best.pt", tmp_path / "new"))
    same = [name for name in old if name in new and "running" not in name and "tracked" not in name]
    assert len(same) > 30 and all(torch.allclose(old[name], new[name], atol=1e-6) for name in same)


@pytest.mark.parametrize("mixer", ["performer", "feature", "linformer", "nystrom"])
@pytest.mark.parametrize("kind", ["folder", "safetensors"])
def test_the_parameters_of_another_attention_are_ignored(mixer: str, kind: str, tmp_path: Path) -> None:
    save_model(source := tiny(mixer=mixer), tmp_path)
    path = tmp_path if kind == "folder" else tmp_path / "model.safetensors"
    load_initial(model := tiny(), str(path), map(str, range(10)))
    assert source.state_dict().keys() - model.state_dict().keys()
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in model.state_dict().items())


def test_weights_of_a_converted_model(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    for name, source in {"zoo": tiny(), "timm": timm.create_model("test_vit", num_classes=10)}.items():
        before = {key: x.clone() for key, x in source.state_dict().items()}
        replace_attention(source, "feature", retrain=True)
        save_linearized(source, tmp_path / name, data={"classes": list(map(str, range(10)))})
        model = tiny() if name == "zoo" else HostModel(timm.create_model("test_vit", num_classes=10))
        load_initial(model, str(tmp_path / name), map(str, range(10)))
        assert all(torch.equal(x, before[key.removeprefix("host.")]) for key, x in model.state_dict().items())
    (tmp_path / "zoo" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--initial-checkpoint: .*model.safetensors"):
        load_initial(tiny(), str(tmp_path / "zoo"), ())


def test_the_parameters_of_another_attention_in_a_model_of_timm_are_ignored(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = HostModel(timm.create_model("test_vit", num_classes=10))
    source = copy.deepcopy(model)
    replace_attention(source.host, "feature", retrain=True)
    state = source.state_dict()
    assert any(name.endswith(".vix.query_features") for name in state)
    load_initial(model, str(_saved(tmp_path / "x.pth", state)), ())
    with pytest.raises(UserError, match="do not fit the model; unexpected: host.blocks.0.attn.table$"):
        load_initial(model, str(_saved(tmp_path / "x.pth", state | {"host.blocks.0.attn.table": torch.zeros(1)})), ())


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pth"])
def test_weights_from_files(kind: str, tmp_path: Path) -> None:
    """Position embeddings are resampled for a larger image. A head with a different number of classes is not loaded."""
    torch.manual_seed(0)
    source = tiny(num_classes=7)
    save_model(source, tmp_path / "saved")
    path = {"folder": tmp_path / "saved", "safetensors": tmp_path / "saved" / "model.safetensors", "pth": tmp_path / "x.pth"}[
        kind
    ]
    torch.save({"state_dict": {f"module.{name}": x for name, x in source.state_dict().items()}}, tmp_path / "x.pth")
    for size in (8, 16):
        torch.manual_seed(1)
        model = create_model("hybrid_vit", img_size=size, patch_size=2, in_chans=1, depth=2, embed_dim=32, num_heads=2)
        head = model.head.weight.clone()
        load_initial(model, str(path), map(str, range(10)))
        assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
        assert torch.equal(model.head.weight, head)
        assert torch.equal(model.pos_embed, source.pos_embed) == (size == 8)
        assert model.pos_embed.shape[1] == 1 + (size // 2) ** 2
        torch.testing.assert_close(model.pos_embed.mean((1, 2)), source.pos_embed.mean((1, 2)), atol=5e-3, rtol=0)
    same = tiny(num_classes=7)
    load_initial(same, str(path), map(str, range(7)))
    assert torch.equal(same.head.weight, source.head.weight)


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda folder: folder / "none.pth", "expected a file with weights, got .*none.pth, which does not exist"),
        (
            lambda folder: folder,
            "expected a folder with a trained model, got .*, which has no best.pt, last.pt, linearized.json",
        ),
        (lambda folder: _write(folder / "bad.pth", b"text"), "bad.pth is damaged or not a file with weights"),
        (lambda folder: _write(folder / "bad.safetensors", b"text"), "bad.safetensors is damaged or not a file with weights"),
        (lambda folder: _saved(folder / "number.pth", 3), "expected a state dict in .*number.pth, got int"),
        (
            lambda folder: _saved(folder / "other.pth", {"x": torch.zeros(3)}),
            "do not fit the model; missing: .*; unexpected: x",
        ),
        (lambda folder: _saved(folder / "code.pth", print), "code.pth is damaged or not a file with weights"),
    ],
)
def test_wrong_weights_are_refused(make: Callable[[Path], Path], error: str, tmp_path: Path) -> None:
    model = tiny()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(UserError, match=f"--initial-checkpoint: .*{error}"):
        load_initial(model, str(make(tmp_path)), ())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_blocks_have_decaying_learning_rates() -> None:
    model = tiny()
    scales = layer_scales([name for name, _ in model.named_parameters()], {"head.weight", "head.bias"}, 0.5)
    assert scales["head.weight"] == scales["norm.weight"] == 1
    assert scales["blocks.1.attn.qkv.weight"] == 0.5 and scales["blocks.0.norm1.bias"] == 0.25
    assert scales["pos_embed"] == scales["cls_token"] == 0.125
    for opt in ("adamw", "muon"):
        optimizer = Optimizer(model, Config(layer_decay=0.5, opt=opt))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.1, torch.amp.GradScaler("cpu", enabled=False), 0)
        rates = {id(p): group["lr"] for part in optimizer.parts for group in part.param_groups for p in group["params"]}
        assert all(abs(rates[id(p)] - 0.1 * scales[name]) < 1e-12 for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "last", "block"),
    [
        ("convnext_atto", "head.norm.bias", "stages.3.blocks.1."),
        ("pvt_v2_b0", "stages.3.norm.bias", "stages.3.blocks.1."),
        ("inception_next_atto", "head.fc1.weight", "stages.3.blocks.1."),
        ("efficientnet_b0", "conv_head.weight", "blocks.6."),
        ("fastvit_t8", "final_conv.se.fc2.bias", "stages.3.blocks.1."),
        ("xcit_nano_12_p16_224", "norm.bias", "cls_attn_blocks.1."),
        ("cait_xxs24_224", "norm.bias", "blocks_token_only.1."),
        ("twins_pcpvt_small", "norm.bias", "blocks.3."),
    ],
)
def test_models_of_timm_have_the_full_learning_rate_after_the_last_block(name: str, last: str, block: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = HostModel(timm.create_model(name))
    parameters = {id(p): name for name, p in model.named_parameters()}
    scales = layer_scales([*parameters.values()], {parameters[id(p)] for p in model.get_classifier().parameters()}, 0.5)
    assert {scales[parameters[id(p)]] for p in model.get_classifier().parameters()} == {scales[f"host.{last}"]} == {1}
    assert all((scale == 0.5) == each.startswith(f"host.{block}") for each, scale in scales.items())
    least = min(scales.values())
    assert all(scales[each] == least for each in scales if re.match(r"host\.(patch_embed|stem|conv_stem|cls_token|pos_)", each))


@pytest.mark.parametrize("distill", ["soft", "features"])
def test_a_student_learns_from_its_teacher(run: Path, distill: str, tmp_path: Path) -> None:
    """A student that starts as a copy of its teacher has a distillation loss near 0. A new student has a larger loss."""
    options = ("--teacher", run, "--distill", distill, "--distill-weight", "1", "--no-aug", "--weight-decay", "0")
    train(*TINY, "--initial-checkpoint", run, *options, "--lr", "1e-6", "--output", tmp_path / "student")
    history = load_checkpoint(tmp_path / "student")["history"]
    assert history[0]["train_loss"] < 0.1  # not 0, because batch norm uses the statistics of each batch in training
    train(*TINY, *options, "--lr", "1e-30", "--seed", "5", "--output", tmp_path / "new")
    assert load_checkpoint(tmp_path / "new")["history"][0]["train_loss"] > 2 * history[0]["train_loss"]


def test_the_distance_of_a_single_output_is_not_zero() -> None:
    """The softmax of a single logit is always 1, so the distance is the squared error of the logits."""
    actual = torch.tensor([[1.0], [2.0]], requires_grad=True)
    loss = distance(actual, torch.tensor([[2.0], [4.0]]), "soft")
    loss.backward()
    assert loss.item() == 5 and actual.grad.ne(0).all()


def test_models_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = ("--model", "timm:vit_tiny_patch16_224", "--model-kwargs", "patch_size=2", "depth=2", "embed_dim=32", "num_heads=2")
    train(*model, "--attention", "nystrom", "--layer-decay", "0.7", "--output", tmp_path / "run")
    train(*model, "--attention", "nystrom", "--epochs", "2", "--resume", tmp_path / "run")
    trained = load_trained(tmp_path / "run", torch.device("cpu"))
    assert trained.shape == (1, 8, 8) and trained.host.blocks[0].attn.vix.op == "nystrom"
    assert main(["validate", "--checkpoint", str(tmp_path / "run")]) == 0
    folder = tmp_path / "softmax"
    train(*model, "--img-size", "12", "--output", folder)  # conversion and validation use the same image size
    converted = ["linearize", "--checkpoint", str(folder), "--steps", "3", "--num-features", "8", "--no-progress"]
    assert main([*converted, "--output", str(tmp_path / "linear")]) == 0
    assert main(["validate", "--checkpoint", str(tmp_path / "linear"), "--dataset", "digits"]) == 0


DISTILLED = ("--model", "timm:deit_tiny_distilled_patch16_224", "--model-kwargs", "patch_size=2", "depth=1", "embed_dim=32")


def test_teachers_with_two_heads(refused: Callable[..., str], tmp_path: Path) -> None:
    """A student with two classifier heads learns to match the features before both heads of the teacher.

    A student with one head is rejected.
    """
    pytest.importorskip("timm")
    train(*DISTILLED, "num_heads=2", "--output", tmp_path / "teacher")
    options = ("--teacher", tmp_path / "teacher", "--distill", "features", "--distill-weight", "1", "--no-aug")
    train(*DISTILLED, "num_heads=2", *options, "--lr", "1e-30", "--output", tmp_path / "new")
    same = ("--initial-checkpoint", tmp_path / "teacher", "--lr", "1e-30", "--output", tmp_path / "same")
    train(*DISTILLED, "num_heads=2", *options, *same)
    new, same = (load_checkpoint(tmp_path / name)["history"][0]["train_loss"] for name in ("new", "same"))
    assert same < 1e-9 < 1e-2 < new
    line = refused(*SMALL, *TINY, *options, "--output", tmp_path / "one")
    assert "--distill: expected a teacher with 32 features before the head, got 32 + 32" in line


def test_the_features_of_other_heads_are_refused() -> None:
    timm = pytest.importorskip("timm")
    model = HostModel(timm.create_model("levit_128s", num_classes=3))
    with pytest.raises(UserError, match="--distill: expected soft for a model whose head is not a linear .* NormLinear"):
        heads(model)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("--attention", "nystrom"), "--attention: expected --model timm:NAME, got hybrid_vip; other models have"),
        (("--pretrained",), "--pretrained: expected --model timm:NAME, got hybrid_vip"),
        (("--layer-decay", "0"), "--layer-decay: expected a number in"),
        (("--teacher", "t", "--distill-weight", "2"), "--distill-weight: expected a number in"),
        (("--teacher", "none"), "--teacher: no checkpoint at "),
        (("--teacher", ""), "--teacher: expected a value, got an empty string"),
        (("--initial-checkpoint", ""), "--initial-checkpoint: expected a value, got an empty string"),
        (("--resume", ""), "--resume: expected a value, got an empty string"),
        (("--distill", "features"), "--distill: expected with --teacher PATH, got features without"),
        (("--distill-weight", "0.9"), "--distill-weight: expected with --teacher PATH, got 0.9 without"),
        (
            ("--initial-checkpoint", "none"),
            "--initial-checkpoint: expected a file with weights, got ",
        ),
        (("--model", "timm:no_such_model"), "--model: expected the name of a timm model, got 'no_such_model'"),
    ],
)
def test_wrong_flags_are_refused(arguments: tuple[str, ...], error: str, refused: Callable[..., str], tmp_path: Path) -> None:
    if "timm" in " ".join(arguments):
        pytest.importorskip("timm")
    assert error in refused("--dataset", "digits", *arguments, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resumed_runs_refuse_other_initial_weights(run: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    """The same initial weights are accepted, so that a command can be repeated with --resume."""
    epochs = ("--epochs", "2", "--resume", run, "--output", tmp_path / "run")
    error = "--initial-checkpoint: expected none with --resume, got "
    assert error in refused(*SMALL, *TINY, *epochs, "--initial-checkpoint", "none")
    train(*TINY, "--initial-checkpoint", run, "--output", tmp_path / "second")
    train(*TINY, "--initial-checkpoint", run, "--epochs", "2", "--resume", tmp_path / "second")
    assert len(load_checkpoint(tmp_path / "second")["history"]) == 2


def test_settings_without_effect_of_earlier_runs_are_ignored(run: Path, tmp_path: Path) -> None:
    """Earlier versions accepted an empty --teacher, and --distill without --teacher."""
    shutil.copytree(run, tmp_path / "run")
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["config"] |= {"teacher": "", "distill": "features", "distill_weight": 0.9}
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    train("--resume", tmp_path / "run", "--epochs", "2")
    assert len(load_checkpoint(tmp_path / "run")["history"]) == 2


def test_teachers_that_do_not_fit_are_refused(run: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    save_model(tiny(num_classes=3), tmp_path / "classes")
    line = refused("--dataset", "digits", "--teacher", tmp_path / "classes", "--output", tmp_path / "run")
    assert "--teacher: expected a model with 10 classes, got 3" in line
    save_model(create_model("hybrid_vit", img_size=16, patch_size=2, in_chans=1), tmp_path / "size")
    line = refused("--dataset", "digits", "--teacher", tmp_path / "size", "--output", tmp_path / "run")
    assert "--teacher: expected a model for images of shape (1, 8, 8), got (1, 16, 16)" in line
    line = refused("--dataset", "digits", "--teacher", run, "--distill", "features", "--output", tmp_path / "run")
    assert "--distill: expected a teacher with 128 features before the head, got 32" in line
