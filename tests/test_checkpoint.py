"""Tests that checkpoints survive killed processes and full disks, and that damaged checkpoints are refused."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from vix_kernels.__main__ import main
from vix_kernels.training import UserError, run
from vix_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from vix_kernels.training.optim import Optimizer
from vix_kernels.training.parallel import Ranks

TINY = ["--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2", "patch_size=4"]


def numbered(step: int) -> dict[str, Any]:
    """Return a checkpoint whose tensors are filled with its step number."""
    weights = {f"layer{i}": torch.full((64, 256), float(step)) for i in range(4)}
    moments = {f"{name}:exp_avg": value for name, value in weights.items()}
    rest = {"config": {}, "model_kwargs": {}, "data": {}, "epoch": 0, "step": step, "history": []}
    return rest | {"model": weights, "optimizer": moments, "ema": {}}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_kill_at_any_moment_keeps_the_last_complete_checkpoint(tmp_path: Path, sharded: bool) -> None:
    path, moments = tmp_path / "last.pt", random.Random(0)
    warnings.simplefilter("ignore")
    save_checkpoint(path, numbered(0), Ranks(), sharded)
    start = 0
    for _ in range(20):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(start + 1, start + 1000):
                save_checkpoint(path, numbered(step), Ranks(), sharded)
                os.write(writing, struct.pack("i", step))
            os._exit(0)
        os.close(writing)
        written = os.read(reading, 4)  # wait for the first save, which may take a long time on a slow machine
        time.sleep(moments.uniform(0.002, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written += os.read(reading, 1 << 16)
        os.close(reading)
        complete = struct.unpack(f"{len(written) // 4}i", written)[-1]
        found = load_checkpoint(path)
        assert found["step"] in (complete, complete + 1)  # the process may be killed before it reports a write
        for part in ("model", "optimizer"):
            assert found[part] and all((value == found["step"]).all() for value in found[part].values())
        start = found["step"]
    assert start >= 20


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_at_any_byte_keeps_the_old_checkpoint(tmp_path: Path, sharded: bool) -> None:
    """Simulate a full disk by limiting the size of files.

    For most limits, torch raises a RuntimeError. For limits just below the size of the file, it raises an OSError.
    `save_checkpoint` raises an OSError in both cases.
    """
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    warnings.simplefilter("ignore")
    save_checkpoint(path, numbered(1), Ranks(), sharded)
    before = {each for each in tmp_path.rglob("*")}
    size = max(each.stat().st_size for each in before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 1000, size // 3, size - 20_000, size - 1000, size - 30, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="File too large|inline_container"):
                save_checkpoint(path, numbered(2), Ranks(), sharded)
            assert load_checkpoint(path)["step"] == 1 and {each for each in tmp_path.rglob("*")} == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save_checkpoint(path, numbered(2), Ranks(), sharded)
    assert load_checkpoint(path)["step"] == 2


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(path: Path, *args: Any) -> None:
        if path.exists():
            raise OSError(28, "No space left on device")
        save_checkpoint(path, *args)

    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epochs", "1", "-b", "512", "--output", str(tmp_path), *TINY])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"{tmp_path / 'last.pt'}: [Errno 28] No space left on device; the previous one is kept" in error
    assert load_checkpoint(tmp_path)["epoch"] == 0


def test_shards_that_cannot_be_written_raise_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file where the folder should be")
    with warnings.catch_warnings(), pytest.raises(OSError, match="shards"):
        warnings.simplefilter("ignore")
        save_checkpoint(tmp_path / "last.pt", numbered(1), Ranks(), sharded=True)


def test_the_best_epochs_are_kept(tmp_path: Path) -> None:
    argv = ["train", "--epochs", "4", "-b", "256", "--checkpoint-hist", "2", "--output", str(tmp_path), *TINY]
    assert main(argv) == 0
    history = load_checkpoint(tmp_path)["history"]
    best = sorted(history, key=lambda row: (-row["eval_top1"], row["eval_loss"]))[:2]
    assert {path.name for path in tmp_path.glob("epoch-*.pt")} == {f"epoch-{row['epoch']}.pt" for row in best}
    for row in best:
        assert load_checkpoint(tmp_path / f"epoch-{row['epoch']}.pt")["history"][-1] == row
    kept = set(tmp_path.glob("epoch-*.pt"))
    assert main(["train", "--resume", str(tmp_path), "--epochs", "5", "--checkpoint-hist", "0"]) == 0
    assert set(tmp_path.glob("epoch-*.pt")) == kept


def test_recovery_checkpoints_are_saved_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are saved at the requested interval, starting in the first epoch."""
    saved = []
    save = run.Run.save
    monkeypatch.setattr(run.Run, "save", lambda self, name: (saved.append((name, self.steps_done)), save(self, name)))
    argv = ["train", "--epochs", "1", "-b", "256", "--recovery-interval", "2", "--output", str(tmp_path), *TINY]
    assert main(argv) == 0
    assert saved == [("last.pt", 0), ("last.pt", 2), ("last.pt", 4), ("last.pt", 6), ("best.pt", 6), ("last.pt", 6)]


def test_a_diverged_run_names_the_step_and_keeps_the_last_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--epochs", "3", "-b", "256", "--output", str(tmp_path), *TINY]
    assert main(argv) == 0
    good = load_checkpoint(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--resume", str(tmp_path), "--epochs", "5", "--lr", "1e30", "--clip-grad", "0"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "the loss of step" in error and "of epoch 4 is not finite" in error and "--lr" in error
    kept = load_checkpoint(tmp_path)
    torch.testing.assert_close(kept["model"], good["model"], rtol=0, atol=0)


def test_the_error_names_the_first_non_finite_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vix_kernels.training import Config, loop

    augmented, steps = loop.augmented, []

    def poisoned(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append(None)
        inputs, targets = augmented(*args)
        return inputs + (torch.nan if len(steps) == 4 else 0), targets

    monkeypatch.setattr(loop, "augmented", poisoned)
    with pytest.raises(UserError, match="the loss of step 4 of epoch 1 is not finite"):
        run.train(Config(epochs=1, batch_size=200, output=str(tmp_path), model_kwargs={"embed_dim": 16, "depth": 1}))


def test_broken_weights_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of a step is computed before the update, so it can be finite although the updated weights are not."""
    step, steps = Optimizer.step, []

    def broken(self: Optimizer, *args: Any) -> None:
        step(self, *args)
        steps.append(None)
        if len(steps) == 3:
            next(iter(self.names)).data.fill_(torch.inf)

    monkeypatch.setattr(Optimizer, "step", broken)
    argv = ["train", "--epochs", "1", "-b", "256", "--recovery-interval", "1", "--output", str(tmp_path), *TINY]
    with pytest.raises(SystemExit):
        main(argv)
    assert "a weight after step 3 of epoch 1 is not finite" in capsys.readouterr().err
    assert load_checkpoint(tmp_path)["step"] == 2
    assert all(x.isfinite().all() for x in load_checkpoint(tmp_path)["model"].values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("row", [1.5, {"epoch": 1}, {"epoch": 1, "eval_top1": {}, "eval_loss": 1.0, "seconds": 1.0}])
def test_a_history_with_invalid_rows_is_refused(row: Any, tmp_path: Path, refused) -> None:
    torch.save(numbered(1) | {"history": [row]}, tmp_path / "last.pt")
    assert "is not a checkpoint of vix train" in refused("--resume", tmp_path)


def test_settings_of_the_wrong_type_are_refused(tmp_path: Path, refused) -> None:
    torch.save(numbered(1) | {"config": {"time_to": [], "min_lr": {}, "lr": None}}, tmp_path / "last.pt")
    assert "--lr: expected float, got None" in refused("--resume", tmp_path, "--epochs", "3")


def test_damaged_shards_give_a_one_line_error(tmp_path: Path, refused) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_checkpoint(tmp_path / "last.pt", numbered(1), Ranks(), sharded=True)
    (shard,) = (tmp_path / "shards").glob("*/*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "is damaged" in refused("--resume", tmp_path)
    shard.unlink()
    assert "is damaged" in refused("--resume", tmp_path)


def test_a_restart_before_the_first_checkpoint_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "args.yaml").write_text("")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", "--epochs", "1", "-b", "512", "--output", str(tmp_path), *TINY]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert main(["train", "--epochs", "2", "-b", "512", "--output", str(tmp_path), *TINY]) == 0  # resumes even without --resume
    assert len(load_checkpoint(tmp_path)["history"]) == 2


def test_a_branched_run_needs_no_best_checkpoint(tmp_path: Path) -> None:
    assert main(["train", "--epochs", "2", "-b", "256", "--output", str(tmp_path / "run"), *TINY]) == 0
    (tmp_path / "run" / "best.pt").unlink()
    argv = ["--epochs", "3", "--lr", "1e-9", "--output", str(tmp_path / "branch")]
    assert main(["train", "--resume", str(tmp_path / "run" / "last.pt"), *argv]) == 0


def test_pickled_code_is_not_executed(tmp_path: Path, refused) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save(numbered(1) | {"config": Evil()}, tmp_path / "last.pt")
    assert "damaged" in refused("--resume", tmp_path)
