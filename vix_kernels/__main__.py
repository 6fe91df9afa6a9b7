"""The command line: `vix`, also `python -m vix_kernels`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vix_kernels import __version__
from vix_kernels.commands import KeyValues, Parser
from vix_kernels.training import Config, UserError

COMMANDS = """\
commands:
  train           train a model
  models          list the models, with their sizes and costs
  convert         turn the weights of an original Vision Xformers model into safetensors
  check           say which backend each op gets here, and every reason why not another
  compile-report  compile every kernel for GPUs that are not there, and weigh the code
  traffic         count the bytes that the kernels move, over the least that they could
  roofline        predict the time of every op on GPUs that are not there, beside what was measured
  bench           measure every op beside its peers, or the models, with tables and pictures
  tune            look for better launch configurations on this GPU

vix COMMAND --help says more.
"""
TRAIN_EXAMPLES = """\
examples:
  vix train --model hybrid_vip --dataset digits
  vix train --model vip --model-kwargs depth=2 position=rope_1d --epochs 20 --amp --output runs/small
  vix train --dataset data/cifar10_jpeg.npz --epochs 6 --warmup-epochs 1
  vix train --dataset data/my_photos --img-size 64              # train/CLASS/*.jpg and val/CLASS/*.jpg
  vix train --resume runs/hybrid_vip-digits

A run leaves args.yaml, summary.csv, learning_curve.png and the checkpoints last.pt and best.pt in its output folder.
"""


def main(argv: Sequence[str] | None = None) -> int:
    commands = {
        "train": _train,
        "models": _models,
        "convert": _convert,
        "check": _check,
        "compile-report": _compile_report,
        "traffic": _traffic,
        "roofline": _roofline,
        "bench": _bench,
        "tune": _tune,
    }
    parser = Parser(prog="vix", epilog=COMMANDS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"vix_kernels {__version__}")
    parser.add_argument("command", choices=commands)
    argv = list(sys.argv[1:] if argv is None else argv)
    command = commands[parser.parse_args(argv[:1]).command]
    try:
        status = command(argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `vix models | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more on its way out
        return 1
    return status


def _train_parser() -> Parser:
    parser = Parser(
        prog="vix train",
        description="Train a ViX model and test it on held-out images after every epoch.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(*flags: str, help: str, **kwargs: Any) -> None:
        parser.add_argument(*flags, help=help if "default" in help else f"{help} (default: %(default)s)", **kwargs)

    add("--model", metavar="NAME", help="a name from `vix models`")
    add("--model-kwargs", nargs="+", action=KeyValues, metavar="K=V", help="arguments of the model (default: none)")
    add(
        "--dataset",
        metavar="NAME",
        help="digits, or the path of a pack (.npz) or of a folder: CIFAR, idx files, train/ and val/",
    )
    add("--img-size", type=int, metavar="N", help="side that images in folders are resized to (default: as they are)")
    add("--epochs", type=int, metavar="N", help="passes over the training images")
    add("-b", "--batch-size", type=int, metavar="N", help="images a step, at most")
    add("--lr", type=float, metavar="LR", help="highest learning rate")
    add("--weight-decay", type=float, metavar="W", help="of AdamW; biases and norms are left out")
    add("--warmup-epochs", type=int, metavar="N", help="epochs of linear warm-up")
    add("--min-lr", type=float, metavar="LR", help="learning rate at the end of the cosine")
    add("--smoothing", type=float, metavar="S", help="label smoothing")
    add("--mixup", type=float, metavar="A", help="blend pairs of images, shares from Beta(A, A); 0 for never")
    add("--cutmix", type=float, metavar="A", help="put a part of one image into another, shares from Beta(A, A); 0 for never")
    add("--reprob", type=float, metavar="P", help="probability to erase a rectangle of an image")
    add("--clip-grad", type=float, metavar="NORM", help="largest gradient norm, 0 for no clipping")
    add(
        "--model-ema",
        action=argparse.BooleanOptionalAction,
        help="test a moving average of the weights, kept too (default: no)",
    )
    add("--model-ema-decay", type=float, metavar="D", help="share of the old average at every step, once it has settled")
    add("--amp", action=argparse.BooleanOptionalAction, help="run the model under autocast (default: no)")
    add("--amp-dtype", choices=["bfloat16"], help="dtype of autocast")
    add("--seed", type=int, metavar="N", help="of the weights, the batches and the augmentation")
    add("--device", metavar="DEVICE", help="auto takes a GPU if there is one")
    add(
        "--backend",
        choices=["auto", "triton", "torch", "reference"],
        help="of linear-cost attention and of the rotary embedding; the softmax of vit is always torch's",
    )
    add("--output", metavar="DIR", help="a folder without a run (default: runs/MODEL-DATASET, numbered)")
    add("--resume", metavar="PATH", help="continue the run in this folder, or from this checkpoint (default: no)")
    parser.set_defaults(**asdict(Config()))
    return parser


def _train(argv: list[str]) -> int:
    parser = _train_parser()

    def parse() -> Config:
        return Config(**vars(parser.parse_args(argv)))

    config = parse()
    try:
        from vix_kernels.training.checkpoint import load_checkpoint
        from vix_kernels.training.loop import best_epoch, train
    except ModuleNotFoundError as error:
        parser.error(f"training needs {error.name}: pip install 'vix_kernels[train]'")
    try:
        if config.resume:
            # What the command line leaves out is as it was in the run that goes on; where it runs may have changed.
            saved = load_checkpoint(config.resume)["config"]
            names = vars(config).keys() - {"device", "backend", "output", "resume"}
            parser.set_defaults(**{name: saved[name] for name in names & saved.keys()})
            config = parse()
        history, output = train(config)
    except (UserError, OSError) as error:  # a path that cannot be read, a disk that is full
        parser.error(str(error))
    except KeyboardInterrupt as stop:
        print(f"vix train: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    best, last = best_epoch(history), history[-1]
    print(
        f"top-1 {best['eval_top1']:.2f} % (best, epoch {best['epoch']}; last {last['eval_top1']:.2f} %), "
        f"top-5 {best['eval_top5']:.2f} %, {last['images_per_second']:,.0f} images/s, {Path(output)}"
    )
    return 0


def _models(argv: list[str]) -> int:
    from vix_kernels.models.commands import models

    return models(argv)


def _convert(argv: list[str]) -> int:
    from vix_kernels.models.commands import convert

    return convert(argv)


def _check(argv: list[str]) -> int:
    from vix_kernels.check import main as check

    return check(argv)


def _compile_report(argv: list[str]) -> int:
    try:
        from vix_kernels._triton.compile_report import main as compile_report
    except ModuleNotFoundError as error:
        Parser(prog="vix compile-report").error(f"it needs {error.name}, which is not installed")
    return compile_report(argv)


def _traffic(argv: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    try:
        from vix_kernels.traffic import main as traffic
    except ModuleNotFoundError as error:
        Parser(prog="vix traffic").error(f"it needs {error.name}, which is not installed")
    return traffic(argv)


def _roofline(argv: list[str]) -> int:
    from vix_kernels.roofline import main as roofline

    return roofline(argv)


def _bench(argv: list[str]) -> int:
    from vix_kernels.bench.sweep import main as bench

    return bench(argv)


def _tune(argv: list[str]) -> int:
    if "--dry-run" in argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    try:
        from vix_kernels._triton.tune import main as tune
    except ModuleNotFoundError as error:
        Parser(prog="vix tune").error(f"it needs {error.name}, which is not installed")
    return tune(argv)


if __name__ == "__main__":
    sys.exit(main())
