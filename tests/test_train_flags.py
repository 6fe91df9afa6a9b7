"""Tests of `vix train` flags that test_training.py does not cover."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_checkpoint import numbered

from vix_kernels.__main__ import main
from vix_kernels.models import create_model
from vix_kernels.nn.module import RedrawnAttentionModule
from vix_kernels.training import Config, run
from vix_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from vix_kernels.training.commands import parse_train, train_parser
from vix_kernels.training.optim import Optimizer, learning_rate
from vix_kernels.training.parallel import Ranks
from vix_kernels.training.recipes import RECIPES
from vix_kernels.training.state import State

WORDS = ["--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2", "patch_size=4"]


def trained(folder: Path, *words: str) -> dict[str, Any]:
    argv = ["train", "--epochs", "1", "--warmup-epochs", "0", "-b", "256", "--output", str(folder), *words]
    assert main([*argv, *WORDS]) == 0
    return load_checkpoint(folder)


def weights(checkpoint: dict[str, Any]) -> torch.Tensor:
    return torch.cat(
        [x.flatten() for x in checkpoint["model"].values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return weights(trained(tmp_path_factory.mktemp("plain"), "--model", "vip"))


@pytest.mark.parametrize(
    "flags", [["--grad-accum-steps", "3"], ["--grad-checkpointing"], ["--channels-last"]], ids=lambda x: x[0]
)
def test_flags_for_speed_and_memory_keep_the_results(flags: list[str], plain: torch.Tensor, tmp_path: Path) -> None:
    """The model is vip, which has no batch norm. Batch norm would make the results depend on how a batch is split."""
    torch.testing.assert_close(weights(trained(tmp_path, "--model", "vip", *flags)), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--opt", "muon"], ["--no-aug"], ["--aa", "trivial"], ["--sched", "constant"], ["--redraw-interval", "2"],
        ["--amp", "--amp-dtype", "float16"], ["--cooldown-epochs", "1"],
    ],
    ids=lambda flags: flags[-1],
)  # fmt: skip
def test_flags_for_training_change_the_results(flags: list[str], plain: torch.Tensor, tmp_path: Path) -> None:
    changed = weights(trained(tmp_path, "--model", "vip", *flags))
    assert changed.isfinite().all() and (changed - plain).abs().max() > 1e-6


def test_gradient_checkpointing_and_drop_path_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(run.Run, "go", lambda self: seen.append(self.state.model))
    run.train(Config(model="vip", drop_path=0.3, grad_checkpointing=True, output=str(tmp_path), model_kwargs={"depth": 3}))
    assert seen[0].grad_checkpointing and seen[0].blocks[2].drop_path.rate == pytest.approx(0.3)


def test_compiled_models_save_unchanged_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are compiled in place, so the names of parameters do not change. test_models.py tests the compiled computation."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    checkpoint = trained(tmp_path, "--model", "vip", "--compile", "--model-ema")
    assert compiled == [("VisionTransformer", {"dynamic": True})] * 2
    create_model("vip", **checkpoint["model_kwargs"]).load_state_dict(checkpoint["model"])


def test_muon_optimizes_the_matrices_of_the_blocks() -> None:
    model = create_model("hybrid_vip", img_size=8, in_chans=1, patch_size=2)
    adamw, muon = Optimizer(model, Config(opt="muon")).parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = {names[p] for group in muon.param_groups for p in group["params"]}
    assert matrices and all(name.startswith("blocks.") and name.endswith(".weight") for name in matrices)
    assert {name for name in names.values() if name.endswith(("qkv.weight", "proj.weight", "fc1.weight"))} <= matrices | {
        name for name in names.values() if name.startswith("patch_embed")
    }
    assert len(names) == len(matrices) + sum(len(group["params"]) for group in adamw.param_groups)
    no_decay = {names[p] for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= no_decay and "head.weight" not in no_decay


def test_model_and_average_redraw_features_on_schedule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    redraw = RedrawnAttentionModule.redraw_projection
    monkeypatch.setattr(RedrawnAttentionModule, "redraw_projection", lambda self: (redraw(self), drawn.append(self.redraws)))
    checkpoint = trained(tmp_path, "--model", "vip", "--redraw-interval", "2", "--model-ema")
    # Before steps 1, 3 and 5 of 6, the features of the model and of its moving average are redrawn.
    assert drawn == [1, 1, 2, 2, 3, 3]
    name = "blocks.0.attn.projection"
    assert torch.equal(checkpoint["model"][name], checkpoint["ema"][name])
    model = create_model("vip", **checkpoint["model_kwargs"])
    for _ in range(3):
        model.blocks[0].attn.redraw_projection()
    assert torch.equal(model.blocks[0].attn.projection, checkpoint["model"][name])


def test_float16_runs_resume_with_their_loss_scale(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, "--model", "vip", "--amp", "--amp-dtype", "float16")
    assert checkpoint["scaler"]["scale"] >= 1024
    assert main(["train", "--resume", str(tmp_path), "--epochs", "2"]) == 0
    tracked = load_checkpoint(tmp_path)["scaler"]["_growth_tracker"]
    assert tracked == checkpoint["scaler"]["_growth_tracker"] + 6  # six steps, none of which overflowed


def test_reaching_the_target_accuracy_ends_the_run(tmp_path: Path) -> None:
    history = trained(tmp_path, "--epochs", "5", "--time-to", "1")["history"]
    assert len(history) == 1 and history[0]["seconds"] > 0 and history[0]["peak_memory_mb"] > 50
    assert main(["train", "--resume", str(tmp_path)]) == 0  # the target accuracy has already been reached
    assert load_checkpoint(tmp_path)["history"] == history
    assert parsed("--resume", str(tmp_path), "--epochs", "2", "--time-to", "1").time_to == 1
    assert main(["train", "--resume", str(tmp_path), "--epochs", "2"]) == 0
    assert load_checkpoint(tmp_path)["history"][:1] == history and load_checkpoint(tmp_path)["epoch"] == 2


def test_more_epochs_keep_a_target_accuracy_not_yet_reached(tmp_path: Path) -> None:
    trained(tmp_path, "--time-to", "100")
    assert parsed("--resume", str(tmp_path), "--epochs", "2").time_to == 100


def test_without_tensorboard_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--log-tensorboard: " in refused("--log-tensorboard", "--output", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trained(tmp_path, "--epochs", "2", "--log-tensorboard")["history"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("accuracy/top-1")]
    assert points == [(row["epoch"], pytest.approx(row["eval_top1"])) for row in history]


def test_learning_rates_of_cooldown_and_constant_schedule() -> None:
    config = Config(epochs=10, warmup_epochs=2, cooldown_epochs=3, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, 5, config) for step in range(50)]
    assert rates[35:] == [pytest.approx(0.1)] * 15 and rates[34] > 0.101
    config.sched = "constant"
    assert [learning_rate(step, 5, config) for step in (9, 10, 49)] == [1.0] * 3


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_defaults_do_not_raise_a_small_learning_rate(recipe: str | None) -> None:
    config = parsed("--lr", "1e-6", "--epochs", "30", *(["--recipe", recipe] if recipe else []))
    config.check()
    rates = [learning_rate(step, 5, config) for step in range(150)]
    assert max(rates) == 1e-6 and rates[-1] <= 1e-6
    assert Config(lr=1e-3).end_lr == 1e-5 and Config(lr=1e-3, min_lr=0.0).end_lr == 0


def test_an_earlier_run_with_min_lr_above_lr_resumes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", numbered(1) | {"config": {"lr": 1e-6, "min_lr": 1e-5}}, Ranks())
    parsed("--resume", str(tmp_path)).check()


def test_a_warmup_longer_than_the_run_prints_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "--warmup-epochs", "3")
    note = "note: --warmup-epochs 3 is longer than --epochs 1: the learning rate ends at 0.00067, below --lr 0.002"
    assert note in capsys.readouterr().out


def parsed(*words: str) -> Config:
    return parse_train(train_parser(), list(words))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_values_and_flags_override_it(name: str) -> None:
    config = parsed("--recipe", name, "--lr", "0.123")
    assert config.lr == 0.123 and config.recipe == name
    for key, value in RECIPES[name].items():
        assert key == "lr" or getattr(config, key) == value
    config.check()


def test_a_file_overrides_its_recipe_and_flags_override_the_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"recipe": "cct", "epochs": 7, "lr": 0.5, "output": "elsewhere"}))
    config = parsed("-c", str(path), "--lr", "0.25")
    assert (config.epochs, config.lr, config.mixup, config.output) == (7, 0.25, 0.8, None)
    path.write_text("epoch: 7\n")
    assert "expected settings as in args.yaml, got epoch" in refused("-c", path)
    path.write_text("- 7\n")
    assert "expected settings as in args.yaml, got [7]" in refused("-c", path)
    assert "cannot read" in refused("-c", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("opt: sgd", "--opt: expected one of adamw, muon, got sgd"),
        ("amp: 'false'", "--amp: expected bool, got 'false'"),
        ("epochs: 7.5", "--epochs: expected int, got 7.5"),
        ("lr: [1]", "--lr: expected float, got [1]"),
        ("recipe: quick", "--recipe: expected one of original, cct, fast, got quick"),
    ],
)
def test_a_file_is_checked_like_flags(line: str, words: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "settings.yaml").write_text(line)
    assert words in refused("-c", tmp_path / "settings.yaml", "--output", tmp_path / "run")


def test_a_recipe_flag_overrides_a_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("lr: 0.5\nepochs: 7\n")
    config = parsed("-c", str(tmp_path / "settings.yaml"), "--recipe", "fast")
    assert (config.lr, config.epochs) == (RECIPES["fast"]["lr"], 7)


def test_drop_path_defaults_to_that_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    monkeypatch.setattr(run.Run, "go", lambda self: rates.append(self.state.model.blocks[-1].drop_path.rate))
    for number, rate in enumerate((None, 0.0)):
        kwargs = {"depth": 2, "embed_dim": 32, "num_heads": 2}
        run.train(Config(model="ccn", drop_path=rate, output=str(tmp_path / str(number)), model_kwargs=kwargs))
    assert rates == [0.1, 0.0]


def test_muon_with_float16_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    words = ["--opt", "muon", "--amp", "--amp-dtype", "float16", "--output", tmp_path]
    assert "--opt: muon does not support float16" in refused(*words)


def test_args_yaml_reproduces_a_run(tmp_path: Path) -> None:
    first = trained(tmp_path / "first", "--model", "vip", "--opt", "muon")
    assert main(["train", "-c", str(tmp_path / "first" / "args.yaml"), "--output", str(tmp_path / "second")]) == 0
    torch.testing.assert_close(load_checkpoint(tmp_path / "second")["model"], first["model"], rtol=0, atol=0)


def test_resuming_with_another_optimizer_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    trained(tmp_path, "--model", "vip")
    assert "--opt" in refused("--resume", tmp_path, "--opt", "muon", "--epochs", "2")


def test_more_accumulation_steps_than_images_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "at most --batch-size 4" in refused("--grad-accum-steps", "5", "-b", "4", "--output", tmp_path)


def test_help_shows_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in RECIPES) and "--opt muon" in text
    assert max(map(len, text.splitlines())) < 260


def test_a_new_state_starts_at_zero_and_evaluates_the_average() -> None:
    model = create_model("vip", img_size=8, in_chans=1, patch_size=2)
    state = State(Config(model_ema=True), model, torch.device("cpu"), Ranks())
    assert state.place == (0, 0, 0) and state.tested is state.ema.model and state.call is model
