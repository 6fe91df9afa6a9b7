"""The commands `vix train`, `vix validate`, `vix predict` and `vix export`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands import KeyValues, Parser
from .config import Config, SharedError, UserError, is_reached
from .recipes import RECIPES

if TYPE_CHECKING:
    from .parallel import Ranks
    from .state import History

CHECKPOINT = "a checkpoint, a run folder (its best checkpoint is used), or a folder written by save_model or vix linearize"
TRAIN_EXAMPLES = """\
examples:
  vix train --model hybrid_vip --dataset digits
  vix train --model hybrid_vin --dataset cifar10 --recipe fast --epochs 30     # downloads CIFAR-10
  vix train --model vip --model-kwargs depth=2 position=rope_1d --epochs 20 --amp --output runs/small
  vix train --dataset data/cifar10_jpeg.npz --epochs 6 --warmup-epochs 1
  vix train --dataset data/my_photos --img-size 64              # train/CLASS/*.jpg and val/CLASS/*.jpg
  vix train --resume runs/hybrid_vip-digits
  torchrun --nproc-per-node 8 -m vix_kernels train --output runs/eight ...     # the same batches, on 8 GPUs

A run writes args.yaml, summary.csv, learning_curve.png, confusion.png, mistakes.png and the checkpoints last.pt and best.pt.
Ctrl-C and SIGTERM save a checkpoint of the current step and end the run. Flags override a --recipe, a recipe overrides a
--config file, and a file overrides the defaults.

recipes:
"""


def train_parser() -> Parser:
    recipes = "".join(
        f"  {name:9} " + " ".join(f"{_flag(key, value)}" for key, value in recipe.items()) + "\n"
        for name, recipe in RECIPES.items()
    )
    parser = Parser(
        prog="vix train",
        description="Train a Vision Xformer, and evaluate it on held-out images after every epoch.",
        epilog=TRAIN_EXAMPLES + recipes,
    )
    group: Any = parser
    for each, about in Config.settings():
        if about["group"] is not None:
            group = parser.add_argument_group(about["group"])
        flags = [name for name in (about["short"], f"--{each.name.replace('_', '-')}") if name]
        kind = each.type.removesuffix(" | None")
        if kind == "bool":
            kwargs, default = {"action": argparse.BooleanOptionalAction}, "no"
        else:
            kwargs, default = {"metavar": about["metavar"], "choices": about["choices"], **_VALUES[kind]}, "%(default)s"
        help = about["help"] if "default" in about["help"] else f"{about['help']} (default: {default})"
        group.add_argument(*flags, help=help, **kwargs)
        if each.name == "recipe":  # --config is listed after --recipe, because both select many settings
            group.add_argument(
                "-c", "--config", metavar="FILE", help="YAML file of settings, such as a run's args.yaml (default: none)"
            )
    parser.set_defaults(**asdict(Config()))
    return parser


def number(text: str) -> float:
    """Parse a number. Whole numbers become int, so that args.yaml contains 3 and not 3.0."""
    value = float(text)
    return int(value) if value.is_integer() else value


_VALUES: dict[str, dict[str, Any]] = {
    "int": {"type": int}, "float": {"type": number}, "str": {}, "dict[str, Any]": {"nargs": "+", "action": KeyValues},
}  # fmt: skip


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"


def parse_train(parser: Parser, argv: list[str]) -> Config:
    """Return the settings of a run.

    Flags override a recipe, a recipe overrides a --config file, and the file overrides the settings of a resumed run or the
    defaults.
    """
    # In `first`, these three settings are None unless their flags are given.
    first = parser.parse_args(argv, argparse.Namespace(epochs=None, distill=None, distill_weight=None))
    settings = _read_settings(first.config) if first.config else {}
    if first.resume:
        from .checkpoint import load_checkpoint

        checkpoint = load_checkpoint(first.resume)
        # These settings are not restored, because a run can be resumed on a different machine or in a different folder.
        changed = {"device", "backend", "output", "resume", "data_dir", "workers", "progress"}
        # Earlier versions accepted empty strings.
        saved = {name: value for name, value in checkpoint["config"].items() if name not in changed and value != ""}
        # A damaged checkpoint may contain values of the wrong type.
        numbers = {name: value for name, value in saved.items() if isinstance(value, (int, float))}
        if (first.epochs or "epochs" in settings) and is_reached(numbers.get("time_to"), checkpoint["history"]):
            del saved["time_to"]  # the run has reached its target accuracy, but the user asks for more epochs
        if numbers.get("min_lr", 0) > numbers.get("lr", math.inf):  # the default --min-lr of earlier versions could exceed --lr
            del saved["min_lr"]
        parser.set_defaults(**saved)
    named = settings.get("recipe")  # a handwritten file may name just a recipe, while args.yaml lists all settings
    parser.set_defaults(**(RECIPES[named] if named in RECIPES else {}) | settings | RECIPES.get(first.recipe, {}))
    values = vars(parser.parse_args(argv))
    del values["config"]
    for name in ("distill", "distill_weight"):
        if values["teacher"] is None and (value := getattr(first, name)) is not None:
            raise UserError(f"--{name.replace('_', '-')}: expected with --teacher PATH, got {value} without")
    return Config(**values)


def _read_settings(path: str) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config: {path}: expected settings as in args.yaml, got {settings!r}")
    if unknown := settings.keys() - {each.name for each in fields(Config)}:
        raise UserError(f"--config: {path}: expected settings as in args.yaml, got {', '.join(map(str, unknown))}")
    # The output and the run to resume describe the old run. Earlier versions accepted empty strings.
    return {name: value for name, value in settings.items() if name not in ("output", "resume") and value != ""}


def train_command(argv: list[str]) -> int:
    parser = train_parser()
    if os.environ.get("RANK", "0") == "0":  # all processes have the same arguments, so one report is enough
        parser.parse_args(argv)  # report invalid arguments before the slow imports
    try:
        from .parallel import connected
        from .run import Stopped, train
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vix_kernels[train]'")
    with connected() as ranks:
        try:
            config = ranks.decided(lambda: parse_train(parser, argv))
            history, output = train(config)
        except (UserError, OSError) as error:  # OSError: for example, an unreadable path or a full disk
            return _failed(parser, ranks, error)
        except Stopped as stop:
            if ranks.first:
                print(f"vix train: {stop}", file=sys.stderr)
            return 128 + stop.number
        except KeyboardInterrupt:
            if ranks.first:
                print("vix train: interrupted", file=sys.stderr)
            return 130
        except Exception:
            if not ranks.fails_first():
                return 1
            if ranks.world > 1:
                print(f"vix train: process {ranks.rank} failed:", file=sys.stderr)
            raise
        if ranks.first:
            _print_end(config, history, output)
    return 0


def _failed(parser: Parser, ranks: Ranks, error: Exception) -> int:
    """Print an error message in only one process, and return the exit code."""
    try:
        if ranks.first if isinstance(error, SharedError) else ranks.fails_first():
            parser.error(str(error) if ranks.first else f"process {ranks.rank}: {error}")
    finally:
        if isinstance(error, SharedError):
            ranks.wait()  # torchrun ends all processes when one exits, so wait until the message is printed
    return 2


def _print_end(config: Config, history: History, output: Path) -> None:
    from .report import best_epoch

    best, last = best_epoch(history), history[-1]
    if config.time_to:
        reached = is_reached(config.time_to, history)
        when = f"reached after {last['seconds']:,.0f} s" if reached else f"not reached in {len(history)} epochs"
        print(f"--time-to {config.time_to:g} %: {when}")
    print(
        f"top-1 {best['eval_top1']:.2f} % (best, epoch {best['epoch']}; last {last['eval_top1']:.2f} %), top-5 "
        f"{best['eval_top5']:.2f} %, {last['images_per_second']:,.0f} images/s, {last['seconds']:,.0f} s, "
        f"{last['peak_memory_mb']:,.0f} MiB peak memory, {output}"
    )


VALIDATE_EXAMPLES = """\
examples:
  vix validate --checkpoint runs/hybrid_vip-digits
  vix validate --checkpoint runs/hybrid_vin-cifar10/epoch-12.pt --dataset data/cifar10_jpeg.npz --output pictures
"""
PREDICT_EXAMPLES = """\
examples:
  vix predict --checkpoint runs/vip-photos cat.jpg dog.png
  vix predict --checkpoint runs/vip-photos --attention maps photos/*.jpg    # also draws maps/cat.png, ...
"""


def validate_command(argv: list[str]) -> int:
    description = "Evaluate a trained model on held-out images, and draw confusion.png and mistakes.png."
    parser = _user_parser("validate", description, VALIDATE_EXAMPLES)
    parser.add_argument("--dataset", metavar="NAME", help="as for vix train (default: the training dataset)")
    parser.add_argument("--data-dir", metavar="DIR", help="as for vix train (default: as in training)")
    parser.add_argument("--output", metavar="DIR", help="folder for the plots (default: validate-NAME next to the checkpoint)")
    options = parser.parse_args(argv)
    try:
        from .data import open_dataset
        from .report import draw_evaluation, skipped
        from .setup import device_of
        from .trained import check_fits, evaluate_trained, load_trained
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vix_kernels[train]'")
    try:
        device = device_of(options.device)
        trained = load_trained(options.checkpoint, device)
        config, name = trained.config, options.dataset or trained.config.dataset
        if not name:
            raise UserError(f"--dataset: expected a name, got none: {options.checkpoint} does not name its dataset")
        if trained.mean is None:
            print(f"note: {options.checkpoint} has no mean and std: using those of {name}", file=sys.stderr)
        size = tuple(trained.model.img_size) if options.dataset else config.img_size
        loading = dict(data_dir=options.data_dir or config.data_dir, stream=config.stream, workers=config.workers)
        source = open_dataset(name, size, **loading)
        check_fits(trained, source)
        dataset = source.load().to(device)
        start = time.perf_counter()
        evaluation = evaluate_trained(trained, dataset)
        seconds = time.perf_counter() - start
        folder = Path(options.output) if options.output else trained.path.parent / f"validate-{dataset.name}"
        folder.mkdir(parents=True, exist_ok=True)
        draw_evaluation(folder, trained, evaluation, dataset)
    except (UserError, OSError) as error:
        parser.error(str(error))
    if unreadable := sorted(dataset.all_unreadable()):
        print(skipped(unreadable))
    classes, totals = dataset.classes, evaluation.confusion.sum(dim=1)
    for images, label, predicted in evaluation.worst_pairs(5):
        print(f"{images} of {totals[label]} {classes[label]} predicted as {classes[predicted]}")
    images = len(dataset.test)
    print(
        f"top-1 {evaluation.top1:.2f} %, top-5 {evaluation.top5:.2f} %, loss {evaluation.loss:.4f} of {images:,} held-out "
        f"images, {images / seconds:,.0f} images/s, {folder / 'confusion.png'}, {folder / 'mistakes.png'}"
    )
    return 0


def predict_command(argv: list[str]) -> int:
    description = "Classify images, and print the most likely classes with their probabilities."
    parser = _user_parser("predict", description, PREDICT_EXAMPLES)
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="image file")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="number of classes to print (default: %(default)s)")
    parser.add_argument(
        "--attention", metavar="DIR", type=Path, help="write an attention map of the class token for each image to DIR"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing attention maps")
    options = parser.parse_args(argv)
    if options.topk < 1:
        parser.error(f"--topk: expected 1 or more, got {options.topk}")
    try:
        from .report import draw_attention
        from .setup import device_of
        from .trained import attention_map, load_trained, predict
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vix_kernels[train]'")
    unreadable = 0
    try:
        trained = load_trained(options.checkpoint, device_of(options.device))
        if trained.mean is None:
            print(f"note: {options.checkpoint} has no mean and std: images are not normalized", file=sys.stderr)
        if not trained.model.num_classes:
            raise UserError(f"--checkpoint: expected a model with a classification head, got none in {options.checkpoint}")
        pictures = _pictures(options.images, options.attention, options.overwrite)
        for picture, (path, image, probabilities) in zip(pictures, predict(trained, options.images), strict=True):
            if isinstance(image, Exception):
                unreadable += 1
                print(f"{path}: cannot be decoded: {image}", file=sys.stderr)
                continue
            values, labels = (each.tolist() for each in probabilities.topk(min(options.topk, len(probabilities))))
            classes = [f"{trained.name(label)} {100 * value:.1f} %" for value, label in zip(values, labels, strict=True)]
            print(f"{path}: {', '.join(classes)}")
            if picture:
                title = f"{path.name.encode(errors='backslashreplace').decode()}: {classes[0]}"
                draw_attention(picture, image.cpu(), attention_map(trained, image).cpu(), title)
    except (UserError, OSError) as error:
        parser.error(str(error))
    return 2 if unreadable else 0


def _pictures(images: list[Path], folder: Path | None, overwrite: bool) -> list[Path | None]:
    """Create `folder`, and return the path of the attention map for each image, or None for each image if `folder` is None.

    If several images have the same file name without the suffix, the paths of their maps are numbered.

    Raises:
        UserError: a path exists already, and `overwrite` is False.
    """
    if folder is None:
        return [None] * len(images)
    pictures: dict[Path, None] = {}  # an ordered set
    drawn = Counter[str]()
    for image in images:
        picture = folder / f"{image.stem}.png"
        while picture in pictures:
            drawn[image.stem] += 1
            picture = folder / f"{image.stem}-{drawn[image.stem] + 1}.png"
        pictures[picture] = None
    if existing := [picture for picture in pictures if picture.exists() and not overwrite]:
        raise UserError(f"--attention: {existing[0]} exists: name another folder, or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    return list(pictures)


def export_command(argv: list[str]) -> int:
    parser = Parser(
        prog="vix export",
        description="Export a trained model to an ONNX file for batches of any size, and compare its outputs in onnxruntime "
        "and in PyTorch. If the checkpoint contains the mean and std of the training images, as a run's checkpoints do, the "
        "exported model takes images in [0, 1] and normalizes them. Otherwise, it takes the same input as the trained model.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, such as model.onnx")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set version (default: recommended by torch)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(argv)
    if Path(options.output).exists() and not options.overwrite:
        parser.error(f"--output: {options.output} exists: name another file, or pass --overwrite")
    try:
        import torch

        from ..export import to_onnx
        from .trained import FromPixels, load_trained
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vix_kernels[train]'")
    try:
        trained = load_trained(options.checkpoint, torch.device("cpu"))
        error = to_onnx(FromPixels(trained), torch.rand(2, *trained.shape), options.output, opset=options.opset)
    except (UserError, OSError, ImportError, TypeError, ValueError, RuntimeError) as problem:
        parser.error(str(problem))
    shape = "x".join(map(str, trained.shape))
    how = "not compared: onnxruntime is not installed" if error is None else f"relative error {error:.1e} in onnxruntime"
    print(f"{options.output}: images of {shape} to {trained.model.num_classes} logits, {how}")
    return 0


def _user_parser(command: str, description: str, examples: str) -> Parser:
    parser = Parser(prog=f"vix {command}", description=description, epilog=examples)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto selects a GPU if available (default: auto)")
    return parser
