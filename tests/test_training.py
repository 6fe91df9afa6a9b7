"""Tests of `vix train`: a short run, its files, exact resumption, and errors for invalid input."""

from __future__ import annotations

import csv
import math
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vix_kernels import backends
from vix_kernels.__main__ import main
from vix_kernels.models import create_model
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.training import Config, UserError, loop, run, setup
from vix_kernels.training.checkpoint import load_checkpoint, write_atomically
from vix_kernels.training.data import load_dataset
from vix_kernels.training.ema import Ema
from vix_kernels.training.optim import learning_rate
from vix_kernels.training.report import best_epoch, write_summary

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
TINY_WORDS = [f"{key}={value}" for key, value in TINY.items()]
MIXED = {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "model_ema": True, "redraw_interval": 4, "aa": "trivial"}
TIMES = ("seconds", "images_per_second", "peak_memory_mb")  # columns that differ in every run


def tiny(output: Path, **kwargs: Any) -> Config:
    """Return a config with dropout, mixup and CutMix, so that a resumed run must draw the same random numbers."""
    kwargs = {"model": "hybrid_vip", "model_kwargs": TINY | {"proj_drop_rate": 0.1}, "batch_size": 256} | MIXED | kwargs
    return Config(epochs=2, warmup_epochs=1, output=str(output), **kwargs)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(tiny(tmp_path_factory.mktemp("full_run")))[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_writes_its_files(full_run: Path) -> None:
    assert set(contents(full_run)) == set(setup.RUN_FILES)
    assert yaml.safe_load((full_run / "args.yaml").read_text())["model_kwargs"]["embed_dim"] == 16
    rows = list(csv.DictReader((full_run / "summary.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", "images_per_second"} <= rows[0].keys()
    assert (full_run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_best_checkpoint_gives_the_reported_accuracy(full_run: Path) -> None:
    checkpoint = load_checkpoint(full_run / "best.pt")
    model = create_model(checkpoint["config"]["model"], **checkpoint["model_kwargs"])
    model.load_state_dict(checkpoint["ema"])
    result = loop.evaluate(model, load_dataset("digits"), Config())
    best = best_epoch(checkpoint["history"])
    assert best["epoch"] == checkpoint["epoch"]
    assert result["eval_top1"] == best["eval_top1"]


@pytest.mark.parametrize(
    ("number", "steps"), [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGTERM, 6), (signal.SIGINT, 8)]
)
def test_a_resumed_run_is_bit_identical(
    full_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    steps: int,
) -> None:
    """A signal stops the run after the first or third step of the first or second epoch. Each epoch has 6 steps."""
    train_step, seen = loop.train_step, []

    def stopped(*args: Any) -> torch.Tensor:
        if len(seen) == steps:
            os.kill(os.getpid(), number)
        seen.append(None)
        return train_step(*args)

    output = tmp_path / "run"
    words = [*TINY_WORDS, "proj_drop_rate=0.1"]
    mixed = ["--mixup", "0.8", "--cutmix", "1", "--reprob", "0.25", "--model-ema", "--redraw-interval", "4", "--aa", "trivial"]
    argv = ["train", "--epochs", "2", "--warmup-epochs", "1", "-b", "256", *mixed, "--model-kwargs", *words]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopped)
        assert main([*argv, "--output", str(output)]) == 128 + number
    assert len(seen) == steps + 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and signal.Signals(number).name in printed and f"--resume {output}" in printed
    assert main(["train", "--resume", str(output)]) == 0

    resumed, expected = load_checkpoint(output), load_checkpoint(full_run)
    for key in ("model", "optimizer", "ema"):
        torch.testing.assert_close(resumed[key], expected[key], rtol=0, atol=0)
    for row in resumed["history"] + expected["history"]:
        for name in TIMES:
            del row[name]
    assert resumed["history"] == expected["history"]
    assert contents(full_run).keys() == contents(output).keys()


def test_a_run_can_branch_from_another(full_run: Path, tmp_path: Path) -> None:
    before = contents(full_run)
    assert main(["train", "--resume", str(full_run / "best.pt"), "--output", str(tmp_path), "--epochs", "3"]) == 0
    assert [row["epoch"] for row in load_checkpoint(tmp_path)["history"]] == [1, 2, 3]
    assert contents(tmp_path).keys() == before.keys()
    assert contents(full_run) == before


def test_a_branch_ignores_a_best_checkpoint_of_later_epochs(full_run: Path, tmp_path: Path) -> None:
    """A branch is a resumed run that writes to a different folder.

    The branch ignores best.pt in the old folder if that file is from a later epoch than the resumed checkpoint.
    """
    start = load_checkpoint(full_run)
    start["history"], start["epoch"] = start["history"][:1], 1
    best = load_checkpoint(full_run / "best.pt")
    best["history"] = load_checkpoint(full_run)["history"]
    (tmp_path / "old").mkdir()
    torch.save(start, tmp_path / "old" / "epoch-1.pt")
    torch.save(best, tmp_path / "old" / "best.pt")
    assert setup.best_of(str(tmp_path / "old" / "epoch-1.pt"), start["history"]) is None
    best["history"] = start["history"]
    torch.save(best, tmp_path / "old" / "best.pt")
    assert setup.best_of(str(tmp_path / "old" / "epoch-1.pt"), start["history"]) is not None


def test_bf16_autocast_trains(full_run: Path, tmp_path: Path) -> None:
    history, _ = run.train(tiny(tmp_path, amp=True))
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert history[0]["train_loss"] != load_checkpoint(full_run)["history"][0]["train_loss"]  # the flag was not ignored


def test_a_resumed_run_can_turn_off_autocast(tmp_path: Path) -> None:
    start = run.train(tiny(tmp_path / "run", amp=True))[1]
    for flags, amp in ([], True), (["--no-amp"], False):
        branch = tmp_path / f"amp-{amp}"
        assert main(["train", "--resume", str(start / "last.pt"), "--output", str(branch), "--epochs", "3", *flags]) == 0
        assert load_checkpoint(branch)["config"]["amp"] is amp
    ends = [load_checkpoint(tmp_path / f"amp-{amp}")["history"][-1]["train_loss"] for amp in (True, False)]
    assert ends[0] != ends[1]


def test_the_last_line_prints_top1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--epochs", "1", "--output", str(tmp_path), "--model-kwargs", *TINY_WORDS]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("top-1 ")


def test_default_output_is_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--epochs", "1", "-b", "512", "--model-kwargs", *TINY_WORDS]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"hybrid_vip-digits", "hybrid_vip-digits-2"}


def test_concurrent_runs_get_different_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(setup.claim_folder, ["name"] * 64))
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("seconds", "drawn"), [(0, [1, 2, 2]), (math.inf, [2])])
def test_the_learning_curve_is_redrawn_during_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, drawn: list[int]
) -> None:
    epochs = []
    monkeypatch.setattr(run, "CURVE_SECONDS", seconds)
    monkeypatch.setattr(run, "draw_learning_curve", lambda path, history, best, title: epochs.append(len(history)))
    run.train(tiny(tmp_path))
    assert epochs == drawn


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "vitt"], ["'vitt'", "'vit'"]),
        (["--model-kwargs", "num_head=3"], ["'num_head'", "'num_heads'"]),
        (["--model-kwargs", "num_heads"], ["--model-kwargs", "'num_heads'"]),
        (["--model-kwargs", "embed_dim=30"], ["embed_dim", "30"]),
        (["--model-kwargs", "num_classes=11"], ["num_classes", "11"]),
        (["--model-kwargs", "global_pool=None"], ["global_pool", "None"]),
        (["--model-kwargs", "global_pool="], ["--model: expected logits of shape (batch, 10), got (2, ", "global_pool"]),
        (["--model", "vin", "--redraw-interval", "10"], ["--redraw-interval: expected 0 for a model without random features"]),
        (["--model-kwargs", "qkv_bias=false"], ["qkv_bias", "'false'"]),
        (["--model-kwargs", "qkv_bias={[]: 1}"], ["qkv_bias", "{[]: 1}"]),
        (["--model-kwargs", "backend=torch"], ["--backend"]),
        (["--dataset", "digit"], ["--dataset", "'digit'"]),
        (["--dataset", "nowhere.npz"], ["--dataset", "nowhere.npz", "No such file"]),
        (["--batch-size", "1", "--model-kwargs", "patch_size=8"], ["--batch-size", "more than 1 value per channel"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--lr", "1e-6", "--min-lr", "1e-5"], ["--min-lr: expected at most --lr 1e-06, got 1e-05"]),
        (["--seed", str(2**64)], ["--seed", str(2**64)]),
        (["--smoothing", "1.5"], ["--smoothing", "1.5"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--backend", "fast"], ["--backend", "fast"]),
        (["--resume", "nowhere"], ["--resume", "nowhere"]),
        (["--resume", "long" * 100], ["long" * 100]),
        (["--lerning-rate", "1"], ["--lerning-rate"]),
    ],
)
def test_bad_arguments_are_refused(argv: list[str], words: list[str], tmp_path: Path, refused: Callable[..., str]) -> None:
    line = refused(*argv, "--output", tmp_path / "run")
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_a_backend_that_cannot_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    assert "CPU" in refused("--backend", "triton", "--device", "cpu", "--output", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_run_is_not_overwritten(full_run: Path, refused: Callable[..., str]) -> None:
    before = contents(full_run)
    assert "--resume" in refused("--output", full_run)
    assert "contains a run" in refused("--resume", full_run / "best.pt")
    assert contents(full_run) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "vip"],
        ["--model-kwargs", "embed_dim=32"],
        ["--seed", "1"],
        ["--epochs", "1"],
    ],
)
def test_a_checkpoint_of_another_run_is_refused(full_run: Path, argv: list[str], refused: Callable[..., str]) -> None:
    before = contents(full_run)
    assert argv[0].strip("-").replace("-", "_") in refused("--resume", full_run, *argv)
    assert contents(full_run) == before


@pytest.mark.parametrize("damage", ["truncated", "text", "other", "empty"])
def test_a_damaged_checkpoint_is_refused(full_run: Path, tmp_path: Path, damage: str, refused: Callable[..., str]) -> None:
    path = tmp_path / "last.pt"
    if damage == "truncated":
        path.write_bytes((full_run / "last.pt").read_bytes()[:20_000])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "other":
        torch.save({"model": {}}, path)
    else:
        torch.save(dict.fromkeys(load_checkpoint(full_run), {}), path)
    before = contents(tmp_path)
    assert str(path) in refused("--resume", path)
    assert contents(tmp_path) == before


def test_a_diverged_run_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lr"):
        run.train(tiny(tmp_path, lr=1e30, clip_grad=0))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert contents(tmp_path) == {"file": b"old"}


def test_a_full_disk_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_summary", full)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epochs", "1", "-b", "512", "--output", str(tmp_path), "--model-kwargs", *TINY_WORDS])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "vix train: error: [Errno 28] No space left on device\n"


def test_an_interruption_before_the_first_epoch_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_dataset", interrupted)
    assert main(["train", "--output", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "vix train: interrupted\n"


def test_summary_keeps_small_numbers(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.csv", [{"epoch": 1, "lr": 1.5e-8}])
    assert (tmp_path / "summary.csv").read_text().splitlines() == ["epoch,lr", "1,1.5e-08"]


def test_learning_rate_schedule() -> None:
    config = Config(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, 5, config) for step in range(50)]
    assert rates[:3] == [0.1, 0.2, pytest.approx(0.3)]
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_model_is_built_for_the_digits(name: str) -> None:
    model, kwargs = setup.build_model(Config(model=name), load_dataset("digits").source(), torch.device("cpu"))
    assert model.img_size == (8, 8) and ("patch_size" in kwargs) == hasattr(model, "patch_size")


@pytest.mark.parametrize("img_size", [8, (8, 8), [8, 8]])
def test_img_size_may_be_a_side_or_a_pair(img_size: int | tuple[int, int] | list[int]) -> None:
    config = Config(model="vip_tiny", model_kwargs={"img_size": img_size})
    _, kwargs = setup.build_model(config, load_dataset("digits").source(), torch.device("cpu"))
    assert kwargs["img_size"] == (8, 8)


def test_ema_averages_parameters_and_copies_buffers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
    ema = Ema(model, decay=0.5)
    start = model[0].weight.detach().clone()
    expected = start.clone()
    for step in range(4):
        with torch.no_grad():
            model[0].weight += 1
            model[1].running_mean.fill_(step)
        expected += (1 - min(0.5, (1 + step) / (10 + step))) * (start + step + 1 - expected)
        ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert ema.model[1].running_mean.item() == 3 and not ema.model[0].weight.requires_grad and ema.updates == 4
