"""Load trained models, evaluate them on held-out images, and predict the classes of image files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix_kernels.models import load_model
from vix_kernels.models.backbone import Backbone
from vix_kernels.models.pretrained import CONFIG
from vix_kernels.nn.module import AttentionModule

from ..integrations import linearized
from .checkpoint import load_checkpoint
from .config import Config, UserError
from .data import Dataset, Source
from .data.images import decode
from .hosts import classifier, create_host, make_model
from .loop import tested

SHOWN_MISTAKES = 24


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode. Its weights are the moving average if the checkpoint contains one.

    Attributes:
        path: the file that the model was loaded from, or the argument `spec` of `load_host`.
        config: the settings that the model was trained with. If the model is not from a checkpoint, these are the defaults
            with an empty `dataset` and the name of the model as `model`. `load_host` uses its argument `spec` as the name.
        model: the model.
        classes: the class names, or None if they are unknown.
        mean, std: the mean and standard deviation (channels, 1, 1) of each channel of the training images, for pixel values in
            [0, 1]. None if unknown.
    """

    path: Path
    config: Config
    model: nn.Module
    classes: tuple[str, ...] | None
    mean: Tensor | None
    std: Tensor | None

    @property
    def host(self) -> nn.Module:
        """The timm or transformers model inside a `HostModel`, or otherwise the model itself."""
        return getattr(self.model, "host", self.model)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input images."""
        return self.model.in_chans, *self.model.img_size

    def name(self, label: int) -> str:
        return self.classes[label] if self.classes else str(label)

    def inputs(self, images: Tensor) -> Tensor:
        """Normalize float images in [0, 1] for the model."""
        return images if self.mean is None else (images - self.mean) / self.std


class FromPixels(nn.Module):
    """A trained model that normalizes its input. It maps float images in [0, 1] to logits."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.trained, self.model = trained, trained.model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.trained.inputs(x))


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """Load a model from a checkpoint file, a run folder, or a folder that `save_model` or `save_linearized` wrote.

    In a run folder, best.pt is loaded if it exists, and otherwise last.pt. The classes, mean and std of the training images are
    stored in the model's config["data"], so that `save_model` writes them.

    Raises:
        UserError: there is no model at `path`, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        names = ("best.pt", "last.pt", linearized.CONFIG, CONFIG)
        file = next((path / name for name in names if (path / name).is_file()), path / "best.pt")
        if file.name in (linearized.CONFIG, CONFIG):
            return _load_saved(file, device)
        path = file
    checkpoint = load_checkpoint(path, flag="--checkpoint")
    known = {each.name for each in fields(Config)}
    config = Config(**{name: value for name, value in checkpoint["config"].items() if name in known})
    data = checkpoint["data"]
    try:
        model = make_model(asdict(config), checkpoint["model_kwargs"], data.get("shape")).to(device).eval()
        model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        model.config["data"] = {name: data[name] for name in ("classes", "mean", "std")}
        return Trained(path, config, model, *_training_images(model, device))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--checkpoint: {path} does not fit this version of vix_kernels: {error}") from error


def _load_saved(file: Path, device: torch.device) -> Trained:
    """Load a model from a folder. `file` is the config.json or linearized.json in this folder."""
    folder = file.parent
    try:
        if file.name == linearized.CONFIG:
            saved = linearized.read_config(folder)
            model = classifier(linearized.load_linearized(folder), saved.get("data")).to(device).eval()
            name = saved["host"].get("name") or saved["host"]["class"]
        else:
            model = load_model(folder).to(device)
            if not isinstance(model, Backbone):
                raise ValueError("an original model has no known image size; use load_model and to_onnx")
            name = model.config.get("name", type(model).__name__)
        return Trained(file, Config(model=name, dataset=""), model, *_training_images(model, device))
    except ModuleNotFoundError as error:
        raise UserError(f"--checkpoint: {folder} needs {error.name}: pip install 'vix_kernels[hub]'") from error
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--checkpoint: cannot load {folder}: {error}") from error


def load_host(spec: str, checkpoint: str | None, pretrained: bool, device: torch.device) -> Trained:
    """Load a classifier from timm or transformers. For the arguments, see hosts.create_host."""
    host, data = create_host(spec, checkpoint, pretrained)
    model = classifier(host, data).to(device).eval()
    return Trained(Path(spec), Config(model=spec, dataset=""), model, *_training_images(model, device))


def _training_images(model: nn.Module, device: torch.device) -> tuple[tuple[str, ...] | None, Tensor | None, Tensor | None]:
    """Return the classes, mean and std in the model's config. Missing values are None."""
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
    """The results of a model on all held-out images.

    Attributes:
        loss: the mean cross-entropy.
        top1, top5: the accuracies in percent.
        confusion: the confusion matrix, (classes, classes). Rows are true classes, and columns are predicted classes.
        mistakes: the misclassified images with the highest predicted probability, uint8 (n, channels, height, width).
        labels, predicted, probability: the true class, the predicted class and its probability for each mistake, (n,).
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
        """Return (count, true class, predicted class) for the `number` most frequently confused pairs of classes."""
        wrong = self.confusion - self.confusion.diag().diag()
        counts, places = wrong.flatten().topk(min(number, wrong.numel()))
        return [(int(n), *divmod(int(place), len(wrong))) for n, place in zip(counts, places, strict=True) if n]


def check_fits(trained: Trained, source: Source) -> None:
    """Raise `UserError` if the images do not have the shape and the classes that the model expects."""
    known = trained.classes or tuple(map(str, range(trained.model.num_classes)))
    if source.classes != known and (trained.classes or len(source.classes) != len(known)):
        expected, actual = (f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (known, source.classes))
        raise UserError(f"--dataset: expected the model's {expected}, got {actual} in {source.name}")
    if source.shape != trained.shape:
        raise UserError(f"--dataset: expected images of the model's shape {trained.shape}, got {source.shape} in {source.name}")


def evaluate_trained(trained: Trained, dataset: Dataset) -> Evaluation:
    """Evaluate the model on the held-out images of `dataset`.

    The images are normalized with the mean and std of the model's training images. If these are unknown, the mean and std of
    `dataset` are used.

    Raises:
        UserError: the classes or the shape of the images differ from those of the model.
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
        mistakes = [torch.cat(each) for each in zip(*wrong, strict=True)]
        order = mistakes[3].argsort(descending=True, stable=True)[:SHOWN_MISTAKES]
        wrong = [tuple(each[order] for each in mistakes)]
    top1 = 100 * confusion.diag().sum().item() / images
    return Evaluation(loss / images, top1, 100 * hits / images, confusion, *wrong[0])


@torch.no_grad()
def predict(trained: Trained, files: list[Path]) -> Iterator[tuple[Path, Tensor | Exception, Tensor | None]]:
    """Yield the path, the image and the class probabilities (classes,) of each file.

    The image (channels, height, width) is resized to the model's image size, and has values in [0, 1]. If a file cannot be
    decoded, the exception is yielded instead of the image, and the probabilities are None.
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
    """Return the class token's attention weights in the last block, averaged over the heads.

    The result has the shape (rows, columns) of the grid of patches.

    Raises:
        UserError: the model has no class token, or its last block has no attention layer.
    """
    model = trained.model
    attention = model.blocks[-1].attn if getattr(model, "num_prefix_tokens", 0) else None
    if not isinstance(attention, AttentionModule):
        missing = "class token" if attention is None else "attention"
        raise UserError(
            f"--attention: expected a model with a class token and attention, {trained.config.model} has no {missing}"
        )
    inputs: list[tuple] = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args[0], kwargs["rope"])), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(trained.inputs(image)[None])
    tokens, rope = inputs[0]
    weights = attention.attention_of(tokens, rope=rope)[0].mean(dim=0)
    return weights[model.num_prefix_tokens :].view(model.grid)
