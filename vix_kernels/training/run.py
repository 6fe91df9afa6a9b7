"""Train the model that a `Config` describes, save checkpoints, print messages and draw plots."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import load_checkpoint, remove_checkpoint, remove_leftovers, save_checkpoint
from .config import Config, UserError, is_reached
from .data import NAMES, open_dataset
from .lock import lock_owner, locked
from .loop import check_finite, evaluate, train_epoch
from .optim import learning_rate
from .parallel import Ranks, connected
from .report import (
    Board,
    best_epoch,
    draw_evaluation,
    draw_learning_curve,
    peak_memory,
    skipped,
    write_args,
    write_summary,
)
from .setup import (
    best_of,
    build_model,
    check_batches,
    check_processes,
    check_same_data,
    check_same_run,
    check_shared_data,
    check_smallest_batch,
    check_tensorboard,
    claim_folder,
    device_of,
    located,
    resumes,
)
from .state import History, State
from .teacher import Teacher
from .trained import evaluate_trained, load_trained

CURVE_SECONDS = 30  # time between updates of the learning curve; an update takes 0.3 s, at most one percent of this time


class Stopped(KeyboardInterrupt):
    """Raised when a signal ends the run, after the state has been saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def train(config: Config) -> tuple[History, Path]:
    """Start or resume the run that `config` describes.

    Under torchrun, all processes must call this function. All inputs are checked before the first file of the run is written.

    Returns:
        The history, with one row per epoch, and the folder of the run.

    Raises:
        UserError: an error occurred that the user can fix.
        Stopped: SIGINT or SIGTERM ended the run. `last.pt` contains the state after the last step.
    """
    config.check()
    with connected() as ranks, ExitStack() as held:
        run = Run(config, ranks, held)
        run.open()
        run.go()
        result = run.state.history, run.output
        del run  # frees the model in all processes before their connections are closed
        ranks.wait()
    return result


class Run:
    """The part of a run that one process executes. Construct a Run, then call `open`, then `go`.

    The first process makes all decisions that depend on files, and sends them to the other processes.

    Args:
        held: the exit stack for everything that must be closed when the run ends, such as the lock on its folder.
    """

    def __init__(self, config: Config, ranks: Ranks, held: ExitStack) -> None:
        self.ranks, self.held = ranks, held
        check_processes(config, ranks)
        self.resume, self.output = ranks.decided(lambda: located(config))
        self.new = True
        with ranks.agreed():
            if config.log_tensorboard and ranks.first:
                check_tensorboard()
        self.is_locked = ranks.decided(lambda: self.output is not None and self.output.is_dir())
        if self.is_locked:
            self.lock()
        with ranks.agreed():
            checkpoint = load_checkpoint(self.resume) if self.resume else None
            device = device_of(config.device)
        torch.backends.cudnn.deterministic = True  # makes convolutions bit-identical in every run
        with ranks.agreed(), ranks.first_alone():
            options = dict(data_dir=config.data_dir, stream=config.stream, workers=config.workers)
            source = open_dataset(config.dataset, config.img_size, **options)
        if config.dataset not in NAMES:  # make a path absolute, because the run may be resumed in a different directory
            config = replace(config, dataset=os.path.abspath(config.dataset))
        paths = {name: os.path.abspath(value) for name in ("teacher", "initial_checkpoint") if (value := getattr(config, name))}
        config = replace(config, **paths)
        with ranks.agreed():
            check_batches(config, ranks, source.train_images)
        with ranks.agreed(), ranks.first_alone():  # with --pretrained, the first process downloads the weights for all
            model, self.model_kwargs = build_model(config, source, device, checkpoint is None)
        with ranks.agreed():
            check_smallest_batch(config, model, ranks, source.train_images)
            if checkpoint:
                check_same_run(checkpoint, config, self.model_kwargs, source)
        with ranks.agreed():
            self.dataset = source.load().to(device)
        check_shared_data(self.dataset, ranks)
        images = len(self.dataset.train)
        with ranks.agreed():
            if images < source.train_images:  # some images cannot be decoded
                check_batches(config, ranks, images)
                check_smallest_batch(config, model, ranks, images)
            if checkpoint:
                check_same_data(checkpoint, config, self.dataset)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.steps = config.steps(images)
        with ranks.agreed():
            teacher = Teacher(config, model, self.dataset, device) if config.teacher else None
        self.state = State(config, model, device, ranks)
        self.state.teacher = teacher
        if checkpoint:
            with ranks.agreed():
                self.state.restore(checkpoint)
        self.title = f"{config.model} on {self.dataset.name}"
        self.unreadable = 0  # number of undecodable images that have been reported
        self.stop, self.board = Stop(), None
        self.drawn = time.perf_counter()
        hidden = None if config.progress is None else not config.progress  # with None, tqdm shows the bar only on a terminal
        self.progress = tqdm(
            total=config.epochs * self.steps,
            initial=self.steps_done,
            unit="step",
            leave=False,
            disable=hidden if ranks.first else True,
        )

    @property
    def config(self) -> Config:
        return self.state.config

    def lock(self) -> None:
        """Lock the folder against other runs until this run ends.

        Also set `new` to False if the folder contains the run to resume.
        """

        def acquire() -> str:
            with output_errors(self.output):
                return self.held.enter_context(locked(self.output))

        owner = self.ranks.decided(acquire)
        with self.ranks.agreed():
            if lock_owner(self.output) != owner:
                raise UserError(f"--output: {self.output} is not the folder that process 0 writes to: name a shared folder")
        self.new = self.ranks.decided(lambda: not resumes(self.output, self.resume))

    def open(self) -> None:
        """Create and lock the folder if it does not exist yet, and write args.yaml.

        Unless the run in the folder continues, also write last.pt. If a run is resumed in another folder, also write
        summary.csv, and copy best.pt if it is from the best epoch.
        """
        history = self.state.history
        branches = self.new and bool(history)  # True if a run is resumed in a new folder, to which best.pt is copied
        with self.ranks.agreed(), output_errors(self.output):
            best = best_of(self.resume, history) if branches and self.ranks.first else None
            if self.ranks.first and not self.is_locked:
                self.output = self.made_folder()
        if not self.is_locked:
            self.lock()
        self.state.config = replace(self.config, output=str(self.output))
        if self.new:
            self.save("last.pt")  # written first, because the other files are useless without it
        with self.ranks.agreed(), output_errors(self.output):
            if self.ranks.first:
                remove_leftovers(self.output)
                if best:
                    save_checkpoint(self.output / "best.pt", best, Ranks())
                if branches:
                    write_summary(self.output / "summary.csv", history)
                write_args(self.output / "args.yaml", self.config)
                if self.config.log_tensorboard:
                    self.board = Board(self.output, len(history))

    def made_folder(self) -> Path:
        """Create and return the folder of a new run. At the end of the run, the folder is removed if it is empty."""
        if self.output is None:
            folder = claim_folder(f"{self.config.model}-{self.dataset.name}")
        else:
            folder = self.output
            folder.mkdir(parents=True, exist_ok=True)  # if two runs create the folder at once, the lock admits only one
        self.held.callback(remove_empty, folder)
        return folder

    def go(self) -> None:
        """Train until the last epoch or the accuracy `time_to` is reached, and draw the plots.

        If a signal or an error ends the training, draw only the learning curve.
        """
        config, history = self.config, self.state.history
        self.say(self.description())
        if config.warmup_epochs > config.epochs:
            last = learning_rate(config.epochs * self.steps - 1, self.steps, config)
            phases = f"--warmup-epochs {config.warmup_epochs} is longer than --epochs {config.epochs}"
            self.say(f"note: {phases}: the learning rate ends at {last:.2g}, below --lr {config.lr:g}")
        elif config.warmup_epochs + config.cooldown_epochs >= config.epochs > 1:
            phases = f"--warmup-epochs {config.warmup_epochs} and --cooldown-epochs {config.cooldown_epochs}"
            self.say(f"note: {phases} leave no epochs of --epochs {config.epochs} between them")
        try:
            with stop_signals(self.stop):
                while len(history) < config.epochs and not is_reached(config.time_to, history):
                    row = {"epoch": len(history) + 1} | train_epoch(self.state, self.dataset, self.after_step)
                    start = time.perf_counter()
                    row |= evaluate(self.state.tested, self.dataset, config, self.ranks)
                    seconds = self.state.seconds + time.perf_counter() - start
                    row["seconds"] = seconds + (history[-1]["seconds"] if history else 0.0)
                    row["peak_memory_mb"] = peak_memory(self.state.device) / 2**20
                    check_finite(self.state, row["eval_loss"])
                    history.append(row)
                    self.state.start_epoch()
                    self.after_epoch()
        except BaseException:
            with suppress(OSError):  # do not hide the original error
                self.draw()
            raise
        finally:
            self.progress.close()
            if self.board:
                self.board.close()
        with self.ranks.agreed():
            self.draw()
            if self.ranks.first:
                self.draw_best()

    @property
    def steps_done(self) -> int:
        return len(self.state.history) * self.steps + self.state.step

    def after_step(self) -> None:
        self.progress.update()
        number, interval = self.ranks.largest(self.stop.number), self.config.recovery_interval
        if number or (interval and self.steps_done % interval == 0):
            check_finite(self.state)
            self.save("last.pt")
        if number:
            epoch, name = len(self.state.history) + 1, signal.Signals(number).name
            self.ranks.wait()  # torchrun ends all processes when one exits, so wait for the checkpoint
            raise Stopped(number, f"stopped by {name} in epoch {epoch}: continue with --resume {self.output}")

    def after_epoch(self) -> None:
        history, config = self.state.history, self.config
        row = history[-1]
        if best_epoch(history) is row:
            self.save("best.pt")
        ranked = sorted(history, key=lambda each: (-each["eval_top1"], each["eval_loss"]))
        worse = []
        if row in ranked[: config.checkpoint_hist]:
            self.save(f"epoch-{row['epoch']}.pt")
            worse = ranked[config.checkpoint_hist :]
        self.save("last.pt")
        unreadable = sorted(self.ranks.union(self.dataset.all_unreadable()))
        if len(unreadable) > self.unreadable:
            self.say(skipped(unreadable))
            self.unreadable = len(unreadable)
        self.say(
            f"epoch {row['epoch']:3}/{config.epochs}  train loss {row['train_loss']:.4f}  held-out loss "
            f"{row['eval_loss']:.4f}  top-1 {row['eval_top1']:6.2f} %  top-5 {row['eval_top5']:6.2f} %  "
            f"{row['images_per_second']:,.0f} images/s"
        )
        with self.ranks.agreed():
            if self.ranks.first:
                for each in worse:
                    remove_checkpoint(self.output / f"epoch-{each['epoch']}.pt")
                write_summary(self.output / "summary.csv", history)
                if self.board:
                    self.board.add(row)
                if time.perf_counter() > self.drawn + CURVE_SECONDS:
                    self.draw()
                    self.drawn = time.perf_counter()

    def save(self, name: str) -> None:
        checkpoint, path = self.state.checkpoint(self.model_kwargs, self.dataset.description()), self.output / name
        with self.ranks.agreed():
            try:
                save_checkpoint(path, checkpoint, self.ranks, self.config.fsdp)
            except OSError as error:
                kept = "; the previous one is kept" if path.exists() else ""
                raise UserError(f"cannot write the checkpoint {path}: {error}{kept}") from error

    def draw(self) -> None:
        history = self.state.history
        if history and self.ranks.first:
            draw_learning_curve(self.output / "learning_curve.png", history, best_epoch(history), self.title)

    def draw_best(self) -> None:
        """Evaluate the best checkpoint, and draw the confusion matrix and the misclassified images."""
        trained = load_trained(self.output, self.state.device)
        draw_evaluation(self.output, trained, evaluate_trained(trained, self.dataset), self.dataset)

    def say(self, line: str) -> None:
        if self.ranks.first:
            self.progress.write(line)

    def description(self) -> str:
        device = str(self.state.device)
        if self.ranks.world > 1:
            device = f"{self.ranks.world} processes ({'FSDP2' if self.config.fsdp else 'DDP'}) on {self.state.device.type}"
        images = f"{len(self.dataset.train):,} training and {len(self.dataset.test):,} held-out images"
        return f"{self.title}: {self.parameters:,} parameters, {images}, {device}, output {self.output}"


@contextmanager
def output_errors(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output: cannot start a run in {folder or 'runs'}: {error}") from error


def remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


class Stop:
    """The last signal received.

    Attributes:
        number: the signal number, or 0 if no signal was received.
    """

    number = 0


@contextmanager
def stop_signals(stop: Stop) -> Iterator[None]:
    """Record SIGINT and SIGTERM in `stop` during the block, instead of ending the program.

    The training loop then saves its state and ends. After the first signal, Ctrl-C ends the program at once. SIGTERM does not,
    because a process can get one SIGTERM from the system and another from torchrun, which forwards the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers only in the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        stop.number = number
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
