"""What a trained model makes of held-out images, and of any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix_kernels.models import create_model, load_model
from vix_kernels.models.backbone import Backbone
from vix_kernels.models.pretrained import CONFIG
from vix_kernels.nn.module import AttentionModule

from .checkpoint import load_checkpoint
from .config import Config, UserError
from .data import Dataset, Source
from .data.images import decode
from .loop import tested

SHOWN_MISTAKES = 24


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode: the average of its weights if the checkpoint has one.

    Attributes:
        config: of its training. A model from `save_model` has the defaults, and no dataset.
        classes: None if `save_model` was not told their names; so are mean and std, (channels, 1, 1), of images in [0, 1].
    """

    path: Path
    config: Config
    model: nn.Module
    classes: tuple[str, ...] | None
    mean: Tensor | None
    std: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model reads."""
        return self.model.in_chans, *self.model.img_size

    def name(self, label: int) -> str:
        return self.classes[label] if self.classes else str(label)

    def inputs(self, images: Tensor) -> Tensor:
        """Float images in [0, 1] to what the model reads."""
        return images if self.mean is None else (images - self.mean) / self.std


class FromPixels(nn.Module):
    """The model behind its normalisation: float images in [0, 1] to logits."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.trained, self.model = trained, trained.model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.trained.inputs(x))


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """From a checkpoint, from the folder of a run (its best one), or from what `save_model` wrote.

    Its config["data"] says what it was trained on, for `save_model`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in ("best.pt", "last.pt", CONFIG) if (path / name).is_file()), path / "best.pt")
        if found.name == CONFIG:
            return _load_saved(path, device)
        path = found
    checkpoint = load_checkpoint(path, flag="--checkpoint")
    known = {each.name for each in fields(Config)}
    config = Config(**{name: value for name, value in checkpoint["config"].items() if name in known})
    data = checkpoint["data"]
    try:
        model = create_model(config.model, **checkpoint["model_kwargs"]).to(device).eval()
        model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        model.config["data"] = {name: data[name] for name in ("classes", "mean", "std")}
        return Trained(path, config, model, *_training_images(model, device))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--checkpoint: {path} does not fit this version: {error}") from error


def _load_saved(folder: Path, device: torch.device) -> Trained:
    try:
        model = load_model(folder).to(device)
        if not isinstance(model, Backbone):
            raise ValueError("it is an original, of which the image size is not known; to_onnx and load_model read it")
        return Trained(folder / CONFIG, Config(model=model.config["name"], dataset=""), model, *_training_images(model, device))
    except ModuleNotFoundError as error:
        raise UserError(f"--checkpoint: {folder} needs {error.name}: pip install 'vix_kernels[hub]'") from error
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--checkpoint: cannot load {folder}: {error}") from error


def _training_images(model: nn.Module, device: torch.device) -> tuple[tuple[str, ...] | None, Tensor | None, Tensor | None]:
    """Classes, mean and std out of the model's config."""
    data = model.config.get("data", {})
    classes = tuple(map(str, data["classes"])) if "classes" in data else None
    if classes and len(classes) != model.num_classes:
        raise ValueError(f"data: expected the names of {model.num_classes} classes, got {len(classes)}")
    if "mean" not in data and "std" not in data:
        return classes, None, None
    mean, std = (torch.tensor(data[name], dtype=torch.float32, device=device).view(-1, 1, 1) for name in ("mean", "std"))
    if not len(mean) == len(std) == model.in_chans:
        raise ValueError(f"data: expected mean and std of {model.in_chans} channels, got {len(mean)} and {len(std)}")
    return classes, mean, std


@dataclass(frozen=True)
class Evaluation:
    """Of all held-out images. `confusion` counts them, (classes, classes): a row is their own class, a column the model's.

    The mistakes are those that the model was surest of: uint8 images (n, channels, height, width), their labels, what the model
    predicted, and its probability.
    """

    loss: float
    top1: float
    top5: float
    confusion: Tensor
    mistakes: Tensor
    labels: Tensor
    predicted: Tensor
    probability: Tensor

    def worst_pairs(self, number: int) -> list[tuple[int, int, int]]:
        """(images, own class, what the model predicted) of the commonest mistakes."""
        wrong = self.confusion - self.confusion.diag().diag()
        counts, places = wrong.flatten().topk(min(number, wrong.numel()))
        return [(int(n), *divmod(int(place), len(wrong))) for n, place in zip(counts, places, strict=True) if n]


def check_fits(trained: Trained, source: Source) -> None:
    """Raises `UserError` for images of another shape, or other classes, than the model's."""
    known = trained.classes or tuple(map(str, range(trained.model.num_classes)))
    if source.classes != known and (trained.classes or len(source.classes) != len(known)):
        ours, theirs = (f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (known, source.classes))
        raise UserError(f"--dataset: the model knows {ours}, {source.name} has {theirs}")
    if source.shape != trained.shape:
        raise UserError(f"--dataset: the model reads images of shape {trained.shape}, {source.name} has {source.shape}")


def evaluate_trained(trained: Trained, dataset: Dataset) -> Evaluation:
    """Test the model on the held-out images of `dataset`, normalised as the training images were.

    If mean and std of those are not known, the images are normalised by those of `dataset`.

    Raises:
        UserError: they have other classes or another shape.
    """
    check_fits(trained, dataset.source())
    if trained.mean is not None:
        dataset = replace(dataset, mean=trained.mean, std=trained.std)
    classes = len(dataset.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    loss, hits, images = 0.0, 0, 0
    wrong: list[tuple[Tensor, ...]] = []
    for pixels, labels, scores in tested(trained.model, dataset, trained.config):
        pixels, labels, scores = pixels.cpu(), labels.cpu(), scores.cpu()
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        best = scores.topk(min(5, scores.shape[1])).indices
        hits += int((best == labels[:, None]).sum())
        images += len(labels)
        predicted = best[:, 0]
        confusion += torch.bincount(labels * len(confusion) + predicted, minlength=confusion.numel()).view_as(confusion)
        probability = scores.softmax(1).amax(1)
        at = (predicted != labels).nonzero()[:, 0]
        wrong.append((pixels[at], labels[at], predicted[at], probability[at]))
        surest = [torch.cat(each) for each in zip(*wrong, strict=True)]
        order = surest[3].argsort(descending=True, stable=True)[:SHOWN_MISTAKES]
        wrong = [tuple(each[order] for each in surest)]
    top1 = 100 * confusion.diag().sum().item() / images
    return Evaluation(loss / images, top1, 100 * hits / images, confusion, *wrong[0])


@torch.no_grad()
def predict(trained: Trained, files: list[Path]) -> Iterator[tuple[Path, Tensor | Exception, Tensor | None]]:
    """For every file: the image as the model sees it, in [0, 1] (channels, height, width), and its probabilities (classes,).

    Instead of an image that cannot be read there is the reason.
    """
    device = next(trained.model.parameters()).device
    for path in files:
        pixels = decode(path, trained.model.img_size)
        if isinstance(pixels, Exception):
            yield path, pixels, None
            continue
        image = torch.from_numpy(pixels.copy()).to(device).float() / 255
        if trained.model.in_chans == 1:
            image = image.mean(dim=0, keepdim=True)
        yield path, image, trained.model(trained.inputs(image)[None])[0].float().softmax(0)


def attention_map(trained: Trained, image: Tensor) -> Tensor:
    """What the class token looks at in the last block, averaged over the heads: (rows, columns) of patches.

    Raises:
        UserError: the model has no class token, or a mixer that is no attention.
    """
    model = trained.model
    attention = model.blocks[-1].attn if getattr(model, "num_prefix_tokens", 0) else None
    if not isinstance(attention, AttentionModule):
        what = "a class token" if attention is None else "attention"
        raise UserError(f"--attention: {trained.config.model} has no {what}: there is no map of what it looks at")
    seen: list[tuple] = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs["rope"])), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(trained.inputs(image)[None])
    tokens, rope = seen[0]
    weights = attention.attention_of(tokens, rope=rope)[0].mean(dim=0)
    return weights[model.num_prefix_tokens :].view(model.grid)
