"""Tests of training in several processes: results match those of one process, and runs survive a killed process."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vix_kernels.__main__ import main
from vix_kernels.training import Config, UserError
from vix_kernels.training.checkpoint import Checkpoint, load_checkpoint
from vix_kernels.training.data import load_dataset
from vix_kernels.training.parallel import Ranks
from vix_kernels.training.setup import check_batches, check_processes
from vix_kernels.training.trained import evaluate_trained, load_trained

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")

# Train for 60 steps. The model has no batch norm, because each process would compute different batch statistics.
RUN = [
    "train", "--model", "vip", "--epochs", "3", "--warmup-epochs", "1", "-b", "72", "--lr", "0.004", "--no-aug",
    "--mixup", "0.2", "--model-ema", "--redraw-interval", "25", "--device", "cpu",
    "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2",
]  # fmt: skip
# Train several models, one after another, in the same processes. In each run folder, save the gradients of the first step.
RUNS = """
import json, os, sys, torch
from pathlib import Path
from torch.distributed.tensor import DTensor
from vix_kernels.__main__ import main
from vix_kernels.training.optim import Optimizer
step = Optimizer.step
def recorded(self, *args):
    if not gradients:
        for parameter, name in self.names.items():
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            gradients[name] = whole.clone()
    step(self, *args)
Optimizer.step = recorded
distributed = "RANK" in os.environ
if distributed:
    torch.distributed.init_process_group("gloo")
for argv in json.loads(sys.argv[1]):
    gradients = {}
    assert main(argv) == 0
    if os.environ.get("RANK", "0") == "0":
        torch.save(gradients, Path(argv[argv.index("--output") + 1]) / "gradients.pt")
if distributed:
    torch.distributed.barrier()  # a process that leaves while others still communicate can abort in gloo's destructor
    torch.distributed.destroy_process_group()
"""
# Start several runs that fail, most of them in only one of two processes. After each failure, both processes continue with the
# next run. The last error simulates a bug.
FAULTS = """
import os, sys, torch
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
from vix_kernels.__main__ import main
from vix_kernels.training import UserError, loop, run
from vix_kernels.training.data import HeldImages
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")

def fail(name, *more):
    torch.distributed.barrier()
    if rank == 0:
        print(f"\\nrun {name}", file=sys.stderr, flush=True)
    torch.distributed.barrier()
    try:
        code = main([*sys.argv[1:], "--output", "run", *more])
    except SystemExit as stop:
        code = stop.code
    if code != 2:
        sys.exit(code)
    torch.distributed.barrier()
    if rank == 0 and Path("run").exists():
        for path in Path("run").iterdir():
            print(path.name, file=sys.stderr, flush=True)
            path.unlink()

def fault(name, module, attribute, where, error, condition=lambda: True):
    original = getattr(module, attribute)
    def called(*args, **options):
        if rank == where and condition():
            raise error
        return original(*args, **options)
    with patch.object(module, attribute, called):
        fail(name)

full = OSError(28, "No space left on device")
fault("model", run, "build_model", 1, UserError("no such model"))
fault("data", run, "open_dataset", 1, UserError("no such data"))
fault("checkpoint", run, "save_checkpoint", 0, full, condition=(Path("run") / "args.yaml").exists)
fault("curve", run, "draw_learning_curve", 0, full)
open_dataset = run.open_dataset
class Files:
    def __init__(self, held):
        self.held, self.to = held, lambda device: self
    def __getattr__(self, name):
        return getattr(self.held, name)
    def __len__(self):
        return len(self.held)
    def batches(self, *args, **options):
        for number, batch in enumerate(self.held.batches(*args, **options)):
            if rank == 1 and number == 2:
                raise UserError("cannot be decoded")
            yield batch
def changed(change):
    def opened(*args, **options):
        source = open_dataset(*args, **options)
        return replace(source, load=lambda: change(source.load()))
    return patch.object(run, "open_dataset", opened)
with changed(lambda data: replace(data, train=Files(data.train))):
    fail("batch")
with changed(lambda data: replace(data, test=HeldImages(data.test.images[1:], data.test.labels[1:])) if rank else data):
    fail("other data")
fail("diverged", "--lr", "1e30", "--clip-grad", "0")
if rank:
    os.makedirs("node/run")
    os.chdir("node")
fail("not shared")
if rank:
    os.chdir("..")
fault("bug", loop, "train_step", 1, KeyError("a bug"))
"""
# The process with rank 1 kills itself before step 31, unless the run has already been restarted.
KILLED = """
import os, signal, sys
from vix_kernels.__main__ import main
from vix_kernels.training import loop
train_step, steps = loop.train_step, []
def step(*args):
    steps.append(None)
    if len(steps) == 31 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)
loop.train_step = step
sys.exit(main(sys.argv[1:]))
"""
# Print the names of the modules that FSDP2 shards.
SHARDED = f"""
import sys
from torch.distributed.fsdp import FSDPModule
sys.path.append({str(Path(__file__).parent)!r})
import torchvision_operators
kept = torchvision_operators.declare() if torchvision_operators.mismatch() else None
from vix_kernels.__main__ import main
from vix_kernels.training import run

class Run(run.Run):
    def go(self):
        modules = self.state.model.named_modules()
        self.say("sharded: " + ", ".join(name or "model" for name, each in modules if isinstance(each, FSDPModule)))
        super().go()

run.Run = Run
sys.exit(main(sys.argv[1:]))
"""


def launch(*words: object, processes: int = 2, restarts: int = 0, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script with torchrun, or directly if there is only one process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=folder)


def run_all(runs: list[list[str]], folder: Path, processes: int) -> None:
    (folder / "runs.py").write_text(RUNS)
    done = launch(folder / "runs.py", json.dumps(runs), processes=processes)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("(best, epoch ") == len(runs)  # only one process prints


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train models in several runs, and return the folder that contains the runs.

    Three runs train the same model: "alone" uses one process, "ddp" uses DDP, and "fsdp" uses FSDP2. The run "muon" uses
    FSDP2 and Muon. The run "fast" uses FSDP2 and the fast recipe. All runs except "alone" use two processes.
    """
    folder = tmp_path_factory.mktemp("runs")
    together = [
        [*RUN, "--output", str(folder / "ddp")],
        [*RUN, "--output", str(folder / "fsdp"), "--fsdp", "--grad-accum-steps", "2"],
        [*RUN, "--output", str(folder / "muon"), "--fsdp", "--opt", "muon", "--epochs", "1"],
        [*RUN, "--output", str(folder / "fast"), "--fsdp", "--recipe", "fast", "--model", "hybrid_vip", "--epochs", "1"],
    ]
    run_all(together, folder, processes=2)
    run_all([[*RUN, "--output", str(folder / "alone")]], folder, processes=1)
    return folder


def assert_close(actual: Checkpoint, expected: Checkpoint) -> None:
    for actual_row, expected_row in zip(actual["history"], expected["history"], strict=True):
        assert actual_row["train_loss"] == pytest.approx(expected_row["train_loss"], abs=1e-3)
        assert actual_row["eval_loss"] == pytest.approx(expected_row["eval_loss"], abs=1e-3)
    for part in ("model", "ema", "optimizer"):
        assert actual[part].keys() == expected[part].keys()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_match_one(runs: Path, name: str) -> None:
    """The results of DDP and FSDP2 match those of a single process. The FSDP2 run splits each batch into two micro-batches."""
    alone = load_checkpoint(runs / "alone")
    assert alone["history"][-1]["train_loss"] < alone["history"][0]["train_loss"] - 0.05
    assert_close(load_checkpoint(runs / name), alone)
    actual, expected = (torch.load(runs / each / "gradients.pt") for each in (name, "alone"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_checkpoints_have_batch_norm_statistics_of_all_processes(runs: Path) -> None:
    """A checkpoint of a run in two processes with the fast recipe reproduces the evaluation loss of that run."""
    row = load_checkpoint(runs / "fast")["history"][-1]
    evaluation = evaluate_trained(load_trained(runs / "fast", torch.device("cpu")), load_dataset("digits"))
    assert evaluation.loss == pytest.approx(row["eval_loss"], abs=0.02) and row["eval_top1"] > 30  # the run used bfloat16


def test_old_shards_are_removed(runs: Path) -> None:
    assert sorted(folder.name.partition("-")[0] for folder in (runs / "fsdp" / "shards").iterdir()) == ["best", "last"]


def test_a_restart_after_a_kill_gives_the_same_results(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = launch(tmp_path / "killed.py", *RUN, "--output", tmp_path / "run", "--recovery-interval", 7, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    actual, expected = load_checkpoint(tmp_path / "run"), load_checkpoint(runs / "ddp")
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0)
    losses = [[row["train_loss"] for row in each["history"]] for each in (actual, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # after a restart, the losses are summed in a different order


def test_an_error_of_any_process_is_printed_once(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    small = [*RUN[:3], "--epochs", "1", *RUN[5:-3], "depth=1"]
    _, *runs = launch("faults.py", *small, folder=tmp_path).stderr.split("\nrun ")
    printed = {name: [line for line in lines if line] for name, *lines in map(str.splitlines, runs)}
    bug = printed.pop("bug")
    full, started_files = "[Errno 28] No space left on device", ["args.yaml", "last.pt"]
    expected = {
        "model": ("process 1: no such model", []),
        "data": ("process 1: no such data", []),
        "checkpoint": (f"process 0: cannot write the checkpoint run/best.pt: {full}", [*started_files, "learning_curve.png"]),
        "curve": (f"process 0: {full}", [*started_files, "best.pt", "summary.csv"]),
        "batch": ("process 1: cannot be decoded", started_files),
        "other data": (
            "process 1: --dataset: digits differs from that of process 0 in its held-out images, held-out labels",
            [],
        ),
        "diverged": (
            "the loss of step 2 of epoch 1 is not finite: try a lower --lr; the last checkpoint is from an earlier step",
            started_files,
        ),
        "not shared": ("process 1: --output: run is not the folder that process 0 writes to: name a shared folder", []),
    }
    for name, (line, files) in expected.items():
        assert sorted(printed[name]) == sorted([f"vix train: error: {line}", *files])
    assert printed.keys() == expected.keys()
    assert bug[0] == "vix train: process 1 failed:" and "[rank1]: KeyError: 'a bug'" in bug
    assert not any(line.startswith("[rank0]") for line in bug)


def test_a_run_resumes_with_another_number_of_processes(runs: Path, tmp_path: Path) -> None:
    """A run that was started with two processes can resume with one or with three processes."""
    branch = ["train", "--resume", str(runs / "muon" / "last.pt"), "--epochs", "2", "--output"]
    assert main([*branch, str(tmp_path / "one"), "--no-fsdp"]) == 0
    run_all([[*branch, str(tmp_path / "three")]], tmp_path, processes=3)
    one, three = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "three")
    assert_close(three, one)
    assert any(name.endswith(":momentum_buffer") for name in one["optimizer"])


def test_configs_that_do_not_fit_the_processes_are_refused() -> None:
    for config, world, word in (
        (Config(batch_size=3, output="run"), 2, "--batch-size: the smallest batch has 2 images"),
        (Config(batch_size=10, grad_accum_steps=5, output="run"), 2, "which get pairs of images, and --grad-accum-steps 5"),
        (Config(batch_size=10, grad_accum_steps=11, output="run"), 1, "too few for one process, which gets pairs of images"),
        (Config(), 2, "--output: expected a folder"),
        (Config(fsdp=True), 1, "--fsdp: expected several processes, got one"),
    ):
        with pytest.raises(UserError, match=word):
            check_processes(config, Ranks(0, world))
            check_batches(config, Ranks(0, world), images=100)


def test_models_of_timm_are_sharded_by_blocks(tmp_path: Path) -> None:
    """The results match those of a single process. The run can be resumed in a single process."""
    pytest.importorskip("timm")
    (tmp_path / "sharded.py").write_text(SHARDED)
    run = ["train", "--model", "timm:vit_tiny_patch16_224", "--epochs", "1", "-b", "72", "--no-aug", "--attention", "nystrom"]
    run += ["--model-ema", "--device", "cpu", "--model-kwargs", "patch_size=2", "depth=2", "embed_dim=32", "num_heads=2"]
    done = launch(tmp_path / "sharded.py", *run, "--fsdp", "--output", tmp_path / "fsdp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "sharded: model, host.blocks.0, host.blocks.1"
    assert main([*run, "--output", str(tmp_path / "alone")]) == 0
    assert_close(load_checkpoint(tmp_path / "fsdp"), load_checkpoint(tmp_path / "alone"))
    assert main(["train", "--resume", str(tmp_path / "fsdp"), "--no-fsdp", "--epochs", "2"]) == 0


def test_shards_that_would_run_code_are_refused(runs: Path, tmp_path: Path, refused) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    shutil.copytree(runs / "fsdp", tmp_path / "run")
    name = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["shards"]
    (tmp_path / "run" / "shards" / name / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "damaged" in refused("--resume", tmp_path / "run")
