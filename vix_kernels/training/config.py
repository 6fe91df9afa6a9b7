"""The settings of a run.

Each setting is declared once, as a field of `Config`. Its `vix train` flag, its checks and its entry in args.yaml are derived
from that declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple

from ..backends import BACKENDS
from .recipes import RECIPES


class UserError(Exception):
    """An error that the user can fix. The command line shows its message in one line, without a traceback."""


class SharedError(UserError):
    """A `UserError` that all processes of a run raise, even if the error occurred in only one of them."""


class Bound(NamedTuple):
    """A constraint on a setting: its description in error messages, and a function that tests a value."""

    expected: str
    holds: Callable[[Any], bool]


POSITIVE = Bound("a finite number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Bound("a finite number of 0 or more", lambda x: 0 <= x < math.inf)
BELOW_ONE = Bound("a number in [0, 1)", lambda x: 0 <= x < 1)
FRACTION = Bound("a number in (0, 1]", lambda x: 0 < x <= 1)
PROBABILITY = Bound("a probability", lambda x: 0 <= x <= 1)
PERCENTAGE = Bound("a percentage", lambda x: 0 < x <= 100)
DEFAULT_MIN_LR = 1e-5
_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict[str, Any]": dict}


def is_reached(time_to: float | None, history: list[dict[str, Any]]) -> bool:
    """Return whether the last epoch in `history` has reached the accuracy `time_to`, at which the run ends."""
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
    """Declare a field of `Config`: its default, and the help and constraints of its flag.

    Args:
        short: the short name of the flag, such as "-b".
        group: the title of a new group in the help. This setting and the settings after it belong to the group.
    """
    about = dict(help=help, metavar=metavar, choices=choices, bound=bound, short=short, group=group)
    made = {"default_factory": dict} if default == {} else {"default": default}
    return field(**made, metadata=about)


@dataclass
class Config:
    """The settings of a run. Each field is also a flag of `vix train`. The help of the flag describes the field."""

    model: str = setting(
        "hybrid_vip", "name of a model that `vix models` lists, or timm:NAME for a timm model", metavar="NAME", group="model"
    )
    model_kwargs: dict[str, Any] = setting({}, "arguments of the model, such as depth=2 (default: none)", metavar="K=V")
    pretrained: bool = setting(False, "download the weights of a timm model")
    attention: str | None = setting(
        None, "attention of a timm model, such as nystrom or performer (default: softmax)", metavar="OP"
    )
    initial_checkpoint: str | None = setting(
        None,
        "start from the weights in a run folder, a checkpoint, a folder written by save_model or vix linearize, or a "
        ".safetensors or .pth file; position embeddings are resampled, and a head for other classes is newly initialized "
        "(default: random weights)",
        metavar="PATH",
    )
    drop_path: float | None = setting(
        None, "stochastic depth: probability of skipping the last block (default: the model's)", metavar="P", bound=BELOW_ONE
    )
    backend: str = setting(
        "auto",
        "backend of linear-cost attention and rotary embeddings; softmax attention always runs in PyTorch",
        choices=BACKENDS,
    )
    dataset: str = setting(
        "digits",
        "digits; cifar10, cifar100, mnist, fashion-mnist or tiny-imagenet (downloaded if needed); or a path to a pack (.npz) "
        "or to a folder with CIFAR files, idx files, or train/CLASS/ and val/CLASS/ images",
        metavar="NAME",
        group="data",
    )
    data_dir: str | None = setting(
        None, "folder of the named datasets, also for downloads (default: the user's cache)", metavar="DIR"
    )
    img_size: int | None = setting(
        None, "resize and crop the images to N x N pixels (default: keep their size)", metavar="N", bound=POSITIVE
    )
    stream: bool | None = setting(None, "decode images in folders on demand, not in advance (default: if they exceed 4 GiB)")
    workers: int = setting(4, "processes that decode streamed images", metavar="N", bound=NOT_NEGATIVE, short="-j")
    aug: bool = setting(True, "mirror and shift images, or rotate, zoom and shift those of digits and idx files (default: yes)")
    crop_scale: float = setting(
        1.0, "enlarge a random crop of at least this fraction of the image's area; 1 to disable", metavar="A", bound=FRACTION
    )
    aa: str = setting("none", "automatic augmentation; trivial is TrivialAugment", choices=("none", "trivial"))
    mixup: float = setting(
        0.0, "blend pairs of images with weights from Beta(A, A); 0 to disable", metavar="A", bound=NOT_NEGATIVE
    )
    cutmix: float = setting(
        0.0, "paste a rectangle of another image, with an area from Beta(A, A); 0 to disable", metavar="A", bound=NOT_NEGATIVE
    )
    mixup_off_epoch: int = setting(0, "end mixup and cutmix after N epochs; 0 for never", metavar="N", bound=NOT_NEGATIVE)
    reprob: float = setting(0.0, "probability of erasing a random rectangle of an image", metavar="P", bound=PROBABILITY)
    recipe: str | None = setting(
        None, "a set of training flags, listed below (default: none)", choices=tuple(RECIPES), group="training"
    )
    epochs: int = setting(20, "passes over the training images", metavar="N", bound=POSITIVE)
    batch_size: int = setting(
        64, "maximum number of images per step, over all processes", metavar="N", bound=POSITIVE, short="-b"
    )
    grad_accum_steps: int = setting(
        1, "split each batch into N parts and accumulate their gradients, to save memory", metavar="N", bound=POSITIVE
    )
    opt: str = setting("adamw", "optimizer; muon uses Muon for matrices and AdamW for the rest", choices=("adamw", "muon"))
    lr: float = setting(2e-3, "peak learning rate", metavar="LR", bound=POSITIVE)
    layer_decay: float = setting(
        1.0, "learning rate of each block relative to the block above it, such as 0.75 for fine-tuning", metavar="D",
        bound=FRACTION,
    )  # fmt: skip
    weight_decay: float = setting(0.05, "weight decay, except for biases and norms", metavar="W", bound=NOT_NEGATIVE)
    sched: str = setting("cosine", "learning rate schedule after the warm-up", choices=("cosine", "constant"))
    warmup_epochs: float = setting(3, "epochs of linear warm-up; can be fractional", metavar="N", bound=NOT_NEGATIVE)
    cooldown_epochs: float = setting(
        0, "final epochs of a cosine schedule at --min-lr, included in --epochs", metavar="N", bound=NOT_NEGATIVE
    )
    min_lr: float | None = setting(
        None,
        f"final learning rate of the cosine schedule (default: {DEFAULT_MIN_LR:g}, or --lr if that is lower)",
        metavar="LR",
        bound=NOT_NEGATIVE,
    )
    smoothing: float = setting(0.1, "label smoothing", metavar="S", bound=BELOW_ONE)
    clip_grad: float = setting(1.0, "maximum gradient norm; 0 to disable clipping", metavar="NORM", bound=NOT_NEGATIVE)
    teacher: str | None = setting(
        None, "also learn from the outputs of a trained model: a run, a checkpoint or a folder (default: none)", metavar="PATH"
    )
    distill: str = setting(
        "soft", "what to learn from the teacher: its class probabilities, or its features before the head",
        choices=("soft", "features"),
    )  # fmt: skip
    distill_weight: float = setting(
        0.5, "weight of the distillation loss; the loss on the labels has the weight 1 - W", metavar="W", bound=FRACTION
    )
    redraw_interval: int = setting(
        0, "steps between redraws of Performer's random features; 0 for never", metavar="N", bound=NOT_NEGATIVE
    )
    model_ema: bool = setting(False, "evaluate a moving average of the weights, and save it as well")
    model_ema_decay: float = setting(
        0.999, "decay of the moving average per step, after its warm-up", metavar="D", bound=BELOW_ONE
    )
    seed: int = setting(0, "seed of the weights, the batches and the augmentation", metavar="N", bound=NOT_NEGATIVE)
    time_to: float | None = setting(
        None, "stop once held-out top-1 reaches ACC %% (default: no)", metavar="ACC", bound=PERCENTAGE
    )
    device: str = setting("auto", "auto selects a GPU if available", metavar="DEVICE", group="speed and memory")
    amp: bool = setting(False, "use automatic mixed precision (autocast)")
    amp_dtype: str = setting("bfloat16", "dtype of autocast", choices=("bfloat16", "float16"))
    compile: bool = setting(False, "compile the model with torch.compile")
    channels_last: bool = setting(False, "use the channels-last memory format for images and convolutions")
    grad_checkpointing: bool = setting(False, "save only the inputs of the blocks and recompute the rest in backward")
    fsdp: bool = setting(False, "with torchrun: use FSDP2 to shard the model and the optimizer (default: use DDP)")
    output: str | None = setting(
        None, "new folder for the run (default: runs/MODEL-DATASET, numbered)", metavar="DIR", group="output"
    )
    resume: str | None = setting(None, "continue the run in this folder, or from this checkpoint (default: no)", metavar="PATH")
    checkpoint_hist: int = setting(0, "also keep the checkpoints of the N best epochs", metavar="N", bound=NOT_NEGATIVE)
    recovery_interval: int = setting(
        0, "steps between checkpoints within an epoch; 0 for none", metavar="N", bound=NOT_NEGATIVE
    )
    log_tensorboard: bool = setting(False, "also write TensorBoard files")
    progress: bool | None = setting(None, "show the progress bar (default: on a terminal)")

    @classmethod
    def settings(cls) -> Iterator[tuple[Field, dict[str, Any]]]:
        """Yield each field and a dict with the arguments that were passed to `setting`, except the default."""
        return ((each, dict(each.metadata)) for each in fields(cls))

    def steps(self, images: int) -> int:
        """Return the number of steps per epoch for `images` training images.

        The images are split into batches of nearly equal size. If all batches but the last were full, the last batch could
        have a single image, for which batch norm fails.
        """
        return math.ceil(images / self.batch_size)

    @property
    def end_lr(self) -> float:
        """The learning rate at the end of the cosine schedule."""
        return min(DEFAULT_MIN_LR, self.lr) if self.min_lr is None else self.min_lr

    def check(self) -> None:
        """Raise `UserError` if a value is invalid. The message names the first invalid setting."""
        for each in fields(self):  # the parser has converted the flags, but a file may contain values of any type
            kind, value = _KINDS[each.type.removesuffix(" | None")], getattr(self, each.name)
            if value is None and each.type.endswith(" | None"):
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"--{each.name.replace('_', '-')}: expected {each.type}, got {value!r}")
            if value == "":  # for example, from a shell variable that is not set
                raise UserError(f"--{each.name.replace('_', '-')}: expected a value, got an empty string")
        for each, about in self.settings():
            if (choices := about["choices"]) is not None:
                self._expect(each.name, Bound(f"one of {', '.join(choices)}", choices.__contains__))
            elif about["bound"] is not None:
                self._expect(each.name, about["bound"])
        if self.opt == "muon" and self.amp and self.amp_dtype == "float16":
            raise UserError(
                "--opt: muon does not support float16, because Muon and AdamW would need a common loss scale: "
                "use --amp-dtype bfloat16"
            )
        if self.fsdp and self.amp and self.amp_dtype == "float16":
            raise UserError("--fsdp: sharded models do not support float16, which needs a loss scale: use --amp-dtype bfloat16")
        is_host = self.model.startswith("timm:")
        for name in ("pretrained", "attention"):
            if getattr(self, name) and not is_host:
                other = "" if name == "pretrained" else "; other models have --model-kwargs mixer=OP"
                raise UserError(f"--{name}: expected --model timm:NAME, got {self.model}{other}")
        if self.pretrained and self.initial_checkpoint:
            raise UserError("--pretrained: cannot be combined with --initial-checkpoint, because both set the weights")
        self._expect("min_lr", Bound(f"at most --lr {self.lr:g}", lambda x: x <= self.lr))
        self._expect("seed", Bound("less than 2**63", lambda x: x < 2**63))
        self._expect("grad_accum_steps", Bound(f"at most --batch-size {self.batch_size}", lambda x: x <= self.batch_size))

    def _expect(self, name: str, bound: Bound) -> None:
        value = getattr(self, name)
        if value is not None and not bound.holds(value):
            raise UserError(f"--{name.replace('_', '-')}: expected {bound.expected}, got {value}")
