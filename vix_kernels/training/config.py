"""What a run is made of. Each setting is declared once: the command line, the checks and args.yaml follow from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple

from ..backends import BACKENDS
from .recipes import RECIPES


class UserError(Exception):
    """Something that the user can put right: one line, shown without a traceback."""


class SharedError(UserError):
    """A `UserError` that is raised in all processes of a run, whichever of them met it."""


class Bound(NamedTuple):
    """What a value has to be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


POSITIVE = Bound("a finite number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Bound("a finite number of 0 or more", lambda x: 0 <= x < math.inf)
BELOW_ONE = Bound("a number in [0, 1)", lambda x: 0 <= x < 1)
SHARE = Bound("a number in (0, 1]", lambda x: 0 < x <= 1)
PROBABILITY = Bound("a probability", lambda x: 0 <= x <= 1)
PERCENTAGE = Bound("a percentage", lambda x: 0 < x <= 100)
DEFAULT_MIN_LR = 1e-5
_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict[str, Any]": dict}


def is_reached(time_to: float | None, history: list[dict[str, Any]]) -> bool:
    """Whether the last epoch has the accuracy that a run is to end at."""
    return bool(time_to and history) and history[-1]["eval_top1"] >= time_to


def setting(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    bound: Bound | None = None,
    short: str | None = None,
    group: str | None = None,
) -> Any:
    """A field of `Config`: its default, and what its flag shows and takes.

    Args:
        short: another name of the flag.
        group: under which heading of the help it and the ones behind it stand.
    """
    about = dict(help=help, metavar=metavar, choices=choices, bound=bound, short=short, group=group)
    made = {"default_factory": dict} if default == {} else {"default": default}
    return field(**made, metadata=about)


@dataclass
class Config:
    model: str = setting("hybrid_vip", "a name from `vix models`", metavar="NAME", group="model")
    model_kwargs: dict[str, Any] = setting({}, "arguments of the model (default: none)", metavar="K=V")
    drop_path: float | None = setting(
        None, "stochastic depth: how often the last block is left out (default: the model's)", metavar="P", bound=BELOW_ONE
    )
    backend: str = setting(
        "auto", "of linear-cost attention and of the rotary embedding; the softmax of vit is always torch's", choices=BACKENDS
    )
    dataset: str = setting(
        "digits",
        "digits; cifar10, cifar100, mnist, fashion-mnist or tiny-imagenet, which are downloaded; or the path of a pack "
        "(.npz) or of a folder: CIFAR, idx files, train/ and val/",
        metavar="NAME",
        group="data",
    )
    data_dir: str | None = setting(
        None, "where data sets with a name lie, or are downloaded to (default: the user's cache)", metavar="DIR"
    )
    img_size: int | None = setting(
        None, "side that images in folders are resized to (default: as they are)", metavar="N", bound=POSITIVE
    )
    stream: bool | None = setting(None, "read images in folders when they are needed (default: beyond 4 GiB)")
    workers: int = setting(4, "processes that decode what is streamed", metavar="N", bound=NOT_NEGATIVE, short="-j")
    aug: bool = setting(True, "mirror and shift the images, turn digits (default: yes)")
    crop_scale: float = setting(
        1.0, "enlarge a random part of at least A of the image's area; 1 for never", metavar="A", bound=SHARE
    )
    aa: str = setting("none", "automatic augmentation: TrivialAugment", choices=("none", "trivial"))
    mixup: float = setting(0.0, "blend pairs of images, shares from Beta(A, A); 0 for never", metavar="A", bound=NOT_NEGATIVE)
    cutmix: float = setting(
        0.0, "put a part of one image into another, shares from Beta(A, A); 0 for never", metavar="A", bound=NOT_NEGATIVE
    )
    mixup_off_epoch: int = setting(0, "neither from this epoch on; 0 for to the end", metavar="N", bound=NOT_NEGATIVE)
    reprob: float = setting(0.0, "probability to erase a rectangle of an image", metavar="P", bound=PROBABILITY)
    recipe: str | None = setting(
        None, "settings that belong together, below (default: none)", choices=tuple(RECIPES), group="training"
    )
    epochs: int = setting(20, "passes over the training images", metavar="N", bound=POSITIVE)
    batch_size: int = setting(64, "images a step, at most, over all processes", metavar="N", bound=POSITIVE, short="-b")
    grad_accum_steps: int = setting(1, "parts that a step's batch is computed in, for less memory", metavar="N", bound=POSITIVE)
    opt: str = setting("adamw", "muon: for the matrices, AdamW for the rest", choices=("adamw", "muon"))
    lr: float = setting(2e-3, "highest learning rate", metavar="LR", bound=POSITIVE)
    weight_decay: float = setting(0.05, "biases and norms are left out", metavar="W", bound=NOT_NEGATIVE)
    sched: str = setting("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup_epochs: float = setting(3, "epochs of linear warm-up, or a part of one", metavar="N", bound=NOT_NEGATIVE)
    cooldown_epochs: float = setting(0, "of the epochs, so many at the end stay at --min-lr", metavar="N", bound=NOT_NEGATIVE)
    min_lr: float | None = setting(
        None,
        f"learning rate at the end of the cosine (default: {DEFAULT_MIN_LR:g}, or --lr if that is lower)",
        metavar="LR",
        bound=NOT_NEGATIVE,
    )
    smoothing: float = setting(0.1, "label smoothing", metavar="S", bound=BELOW_ONE)
    clip_grad: float = setting(1.0, "largest gradient norm, 0 for no clipping", metavar="NORM", bound=NOT_NEGATIVE)
    redraw_interval: int = setting(
        0, "steps between new random features of Performers, 0 for never", metavar="N", bound=NOT_NEGATIVE
    )
    model_ema: bool = setting(False, "test a moving average of the weights, kept too")
    model_ema_decay: float = setting(
        0.999, "share of the old average at every step, once it has settled", metavar="D", bound=BELOW_ONE
    )
    seed: int = setting(0, "of the weights, the batches and the augmentation", metavar="N", bound=NOT_NEGATIVE)
    time_to: float | None = setting(
        None, "end once held-out top-1 is ACC %% or more (default: no)", metavar="ACC", bound=PERCENTAGE
    )
    device: str = setting("auto", "auto takes a GPU if there is one", metavar="DEVICE", group="speed and memory")
    amp: bool = setting(False, "run the model under autocast")
    amp_dtype: str = setting("bfloat16", "dtype of autocast", choices=("bfloat16", "float16"))
    compile: bool = setting(False, "torch.compile the model")
    channels_last: bool = setting(False, "images and convolutions in channels-last layout")
    grad_checkpointing: bool = setting(False, "keep only the inputs of the blocks, compute the rest again in backward")
    fsdp: bool = setting(False, "under torchrun: divide model and optimizer among the processes (default: DDP, each has all)")
    output: str | None = setting(
        None, "a folder without a run (default: runs/MODEL-DATASET, numbered)", metavar="DIR", group="output"
    )
    resume: str | None = setting(None, "continue the run in this folder, or from this checkpoint (default: no)", metavar="PATH")
    checkpoint_hist: int = setting(0, "keep the checkpoints of the N best epochs too", metavar="N", bound=NOT_NEGATIVE)
    recovery_interval: int = setting(
        0, "steps between checkpoints inside an epoch, 0 for none", metavar="N", bound=NOT_NEGATIVE
    )
    log_tensorboard: bool = setting(False, "write TensorBoard's files too")
    progress: bool | None = setting(None, "show the progress bar (default: on a terminal)")

    @classmethod
    def settings(cls) -> Iterator[tuple[Field, dict[str, Any]]]:
        """Its fields, each with what `setting` was told."""
        return ((each, dict(each.metadata)) for each in fields(cls))

    def steps(self, images: int) -> int:
        """Of an epoch. Its batches are of nearly equal length, so that batch norm never meets a last batch of one image."""
        return math.ceil(images / self.batch_size)

    @property
    def end_lr(self) -> float:
        """Learning rate at the end of the cosine."""
        return min(DEFAULT_MIN_LR, self.lr) if self.min_lr is None else self.min_lr

    def check(self) -> None:
        """Raises `UserError` for the first value that makes no sense."""
        for each in fields(self):  # not of a flag: of a file
            kind, value = _KINDS[each.type.removesuffix(" | None")], getattr(self, each.name)
            if value is None and each.type.endswith(" | None"):
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"--{each.name.replace('_', '-')}: expected {each.type}, got {value!r}")
        for each, about in self.settings():
            if (choices := about["choices"]) is not None:
                self._expect(each.name, Bound(f"one of {', '.join(choices)}", choices.__contains__))
            elif about["bound"] is not None:
                self._expect(each.name, about["bound"])
        if self.opt == "muon" and self.amp and self.amp_dtype == "float16":
            raise UserError("--opt: muon has no loss scale in common with AdamW, which float16 needs: use --amp-dtype bfloat16")
        if self.fsdp and self.amp and self.amp_dtype == "float16":
            raise UserError("--fsdp: divided models have no loss scale, which float16 needs: use --amp-dtype bfloat16")
        self._expect("min_lr", Bound(f"at most --lr {self.lr:g}", lambda x: x <= self.lr))
        self._expect("seed", Bound("less than 2**63", lambda x: x < 2**63))
        self._expect("grad_accum_steps", Bound(f"at most --batch-size {self.batch_size}", lambda x: x <= self.batch_size))

    def _expect(self, name: str, bound: Bound) -> None:
        value = getattr(self, name)
        if value is not None and not bound.holds(value):
            raise UserError(f"--{name.replace('_', '-')}: expected {bound.expected}, got {value}")
