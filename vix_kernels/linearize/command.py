"""The command `vix linearize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands import Parser
from ..training.config import SharedError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.data import Dataset
    from ..training.parallel import Ranks
    from ..training.trained import Trained
    from .report import Report

EXAMPLES = """\
examples:
  vix linearize --checkpoint runs/vit-digits --dataset digits --output runs/vit-digits-linear
  vix linearize --checkpoint runs/hybrid_vit-cifar10 --dataset cifar10 --num-features 16 --output runs/linear
  vix linearize --checkpoint runs/vit-photos --dataset data/photos --op nystrom --max-error 0.01 --output runs/nystrom
  vix linearize --model timm:vit_small_patch16_224 --pretrained --dataset data/photos --output runs/small-linear
  vix validate --checkpoint runs/vit-digits-linear --dataset digits
  torchrun --nproc-per-node 8 -m vix_kernels linearize ...                     # the processes split each batch

The features are fitted to a random sample of the training images, without their labels. The report compares the outputs of the
converted model and of the original on a random sample of the held-out images. Every run draws the same samples. The folder
--output contains model.safetensors, linearized.json, report.txt and report.png. `vix validate`, `predict` and `export` read it.
To continue an interrupted conversion, repeat the command.
"""


def linearize_command(argv: list[str]) -> int:
    parser = Parser(
        prog="vix linearize",
        description="Convert the softmax attention of a trained model to linear-cost attention.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="a run, a checkpoint or a folder, as for vix validate; or the weights of --model")
    add(
        "--model",
        metavar="HOST:NAME",
        help="timm:NAME, or hf:FOLDER with a model saved by transformers (default: the model in --checkpoint)",
    )
    add("--pretrained", action="store_true", help="download the weights of a timm model")
    add("--dataset", metavar="NAME", help="as for vix train (default: the dataset that the checkpoint was trained on)")
    add("--data-dir", metavar="DIR", help="as for vix train")
    add("--op", default="feature", metavar="OP", help="feature, nystrom, performer, agent or linear (default: %(default)s)")
    add(
        "--num-features",
        type=int,
        metavar="M",
        help="number of features (default: 32 for feature, and D ln D for performer with head width D)",
    )
    add(
        "--num-landmarks",
        type=int,
        metavar="M",
        help="number of landmarks for nystrom (default: 64, or chosen for each layer with --max-error)",
    )
    add(
        "--exact-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use exact softmax attention for class and register tokens (default: yes)",
    )
    add("--layers", nargs="+", metavar="NAME", help='names or patterns of attention layers, such as "blocks.1*" (default: all)')
    add(
        "--max-error",
        type=float,
        metavar="E",
        help="keep softmax in layers with a larger relative squared error (default: convert all)",
    )
    add("--steps", type=int, default=400, metavar="N", help="number of steps that fit the features (default: %(default)s)")
    add(
        "--finetune-steps",
        type=int,
        default=0,
        metavar="N",
        help="number of steps that then train all weights (default: %(default)s)",
    )
    add(
        "--distill",
        default="soft",
        choices=("soft", "features"),
        help="output that --finetune-steps reproduces: class probabilities or features (default: soft)",
    )
    add("--batch-size", "-b", type=int, default=16, metavar="N", help="images per batch (default: %(default)s)")
    add("--images", type=int, default=512, metavar="N", help="number of training images (default: %(default)s)")
    add("--eval-images", type=int, default=1024, metavar="N", help="held-out images for the report (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the features (default: %(default)s)")
    add("--device", default="auto", metavar="DEVICE", help="auto selects a GPU if available (default: auto)")
    add("--output", required=True, metavar="DIR", help="new folder for the result")
    add("--overwrite", action="store_true", help="replace the result in --output")
    add("--progress", action=argparse.BooleanOptionalAction, help="show the progress bar (default: on a terminal)")
    options = parser.parse_args(argv)
    if (options.model is None) == (options.checkpoint is None) and options.model is None:
        parser.error("--checkpoint: expected a run, a checkpoint or a folder, or --model, got neither")
    if options.pretrained and (options.model is None or options.checkpoint):
        parser.error("--pretrained: expected with --model timm:NAME and without --checkpoint")
    try:
        from ..training.parallel import connected
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vix_kernels[train,hub]'")
    if options.model and options.model.startswith("timm:") and not (options.pretrained or options.checkpoint):
        parser.error(f"--model: expected --pretrained or --checkpoint with {options.model}, whose weights would be random")
    with connected() as ranks:
        try:
            report = _run(options, ranks)
        except (UserError, OSError, ValueError, TypeError, NotImplementedError, ModuleNotFoundError) as error:
            if ranks.fails_first() or isinstance(error, SharedError):
                parser.error(str(error).partition("\n")[0])
            return 2
        except KeyboardInterrupt:
            if ranks.first:
                from ..integrations.linearized import PROGRESS

                how = " without --overwrite" if options.overwrite and (Path(options.output) / PROGRESS).exists() else ""
                print(f"vix linearize: interrupted, repeat the command{how} to continue in {options.output}", file=sys.stderr)
            return 130
        if ranks.first:
            print(report)
            print(f"{options.output}: {len(report.converted)} layers of linear-cost attention")
    return 0


def _run(options: Any, ranks: Ranks) -> Report:
    from ..integrations.linearized import PROGRESS, save_linearized
    from ..training.setup import device_of
    from ..training.trained import load_host, load_trained
    from .convert import linearize

    folder = Path(options.output)
    _check_folder(folder, options.overwrite)
    for name in ("batch_size", "images", "eval_images"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    device = device_of(options.device)
    if options.model:
        trained = load_host(options.model, options.checkpoint, options.pretrained, device)
    else:
        trained = load_trained(options.checkpoint, device)
    dataset = _dataset(trained, options).to(device)
    core_options = {"num_features": options.num_features, "num_landmarks": options.num_landmarks}
    core_options = {name: value for name, value in core_options.items() if value is not None}
    if options.op != "linear":
        core_options["exact_prefix"] = options.exact_prefix
    size = options.batch_size  # the report uses the same size, because large batches may not fit in memory
    with _locked(folder, ranks):
        report = linearize(
            trained.host, _batches(dataset, trained, dataset.train, options.images, size), op=options.op,
            layers=options.layers, steps=options.steps, finetune_steps=options.finetune_steps, distill=options.distill,
            max_error=options.max_error, eval_batches=_batches(dataset, trained, dataset.test, options.eval_images, size),
            eval_samples=options.eval_images, output=folder, overwrite=options.overwrite, seed=options.seed,
            progress=options.progress, **core_options,
        )  # fmt: skip
        if ranks.first:
            classes = _classes(trained, dataset, options)
            data = {"classes": list(classes)} if classes else {}
            mean, std = (dataset.mean, dataset.std) if trained.mean is None else (trained.mean, trained.std)
            data |= {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
            save_linearized(trained.host, folder, data=data, overwrite=True)
            (folder / "report.txt").write_text(f"{report}\n")
            report.draw(folder / "report.png")
            (folder / PROGRESS).unlink(missing_ok=True)
    return report


def _classes(trained: Trained, dataset: Dataset, options: Any) -> tuple[str, ...] | None:
    """Return the class names to save with the result, or None if they are unknown.

    The names come from the model by default. They come from the dataset if it has as many classes as the model and if one of
    these conditions holds:

    - The model has no class names.
    - --model is given, and no class name of the model occurs in the dataset. For example, transformers models and image folders
      often name the same classes differently. With the names of the dataset, the result can be validated on this dataset.
    """
    known, found = trained.classes, dataset.classes
    if len(found) != trained.model.num_classes:
        return known
    if known and not (options.model and set(known).isdisjoint(found)):
        return known
    if known and known != found:
        names = f"{', '.join(found[:3])}, ...) in place of those of the model ({', '.join(known[:3])}, ...)"
        print(f"vix linearize: note: the result has the class names of {dataset.name} ({names}", file=sys.stderr)
    return found


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise UserError if `folder` is a file, or contains files but neither linearized.json nor linearize.pt.

    If `overwrite` is False, the function also rejects a folder with a converted model. It always accepts a folder with
    linearize.pt, the checkpoint of a conversion.
    """
    from ..integrations.linearized import CONFIG, PROGRESS, WEIGHTS

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: expected a folder, got {folder}, which is a file")
    found = {each.name for each in folder.iterdir() if not each.name.startswith(".")} if folder.is_dir() else set()
    if {CONFIG, WEIGHTS} <= found and PROGRESS not in found and not overwrite:
        raise UserError(f"--output: expected a new folder, or --overwrite, got {folder}, which contains a converted model")
    if found and not found & {CONFIG, PROGRESS}:
        raise UserError(f"--output: expected a new folder, got {folder}, which contains other files")


@contextmanager
def _locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Create and lock the folder, so that no other command writes to it.

    On exit, remove the folder if it is new and empty.
    """
    from ..training.checkpoint import remove_leftovers
    from ..training.lock import locked

    def acquire() -> None:
        is_new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: cannot create {folder}: {error.strerror}") from error
        if is_new:
            held.callback(_remove_if_empty, folder)
        held.enter_context(locked(folder))
        remove_leftovers(folder)

    with ExitStack() as held:
        ranks.decided(acquire)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _dataset(trained: Trained, options: Any) -> Dataset:
    from ..training.data import open_dataset

    name = options.dataset or trained.config.dataset
    if not name:
        raise UserError("--dataset: expected a name, because the checkpoint does not state its training dataset, got none")
    source = open_dataset(name, tuple(trained.model.img_size), data_dir=options.data_dir or trained.config.data_dir)
    if source.shape != trained.shape:
        raise UserError(f"--dataset: expected images of the model's shape {trained.shape}, got {source.shape} in {source.name}")
    return source.load()


def _batches(dataset: Dataset, trained: Trained, images: Any, count: int, size: int) -> Callable[[], Iterator[Tensor]]:
    """Return a function that iterates over `count` random images in batches of `size`. Every call yields the same batches."""
    import torch

    def batches() -> Iterator[Tensor]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        for pixels, _ in images.batches(list(order.split(size))):
            x = pixels.float() / dataset.max_value
            yield dataset.normalised(x) if trained.mean is None else trained.inputs(x)

    return batches
