"""What a trained model makes of held-out images, and of any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix_kernels.models import create_model
from vix_kernels.nn import Attention

from .checkpoint import load_checkpoint
from .config import Config, UserError
from .data import Dataset, Source
from .data.images import decode
from .loop import tested

SHOWN_MISTAKES = 24


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint: the average of its weights where there is one, in evaluation mode."""

    path: Path
    config: Config
    model: nn.Module
    classes: tuple[str, ...]
    mean: Tensor  # (channels, 1, 1), of images in [0, 1]
    std: Tensor

    def inputs(self, images: Tensor) -> Tensor:
        """Float images in [0, 1] to what the model reads."""
        return (images - self.mean) / self.std


class FromPixels(nn.Module):
    """The model behind its normalisation: float images in [0, 1] to logits."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.trained, self.model = trained, trained.model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.trained.inputs(x))


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """From a checkpoint, or from the folder of a run: its best one.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in ("best.pt", "last.pt") if (path / name).is_file()), path / "best.pt")
    checkpoint = load_checkpoint(path, flag="--checkpoint")
    known = {each.name for each in fields(Config)}
    config = Config(**{name: value for name, value in checkpoint["config"].items() if name in known})
    data = checkpoint["data"]
    try:
        model = create_model(config.model, **checkpoint["model_kwargs"]).to(device).eval()
        model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        mean, std = (torch.tensor(data[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
        classes = tuple(data["classes"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--checkpoint: {path} does not fit this version: {error}") from error
    return Trained(path, config, model, classes, mean, std)


@dataclass(frozen=True)
class Judgement:
    """Of all held-out images. `confusion` counts them, (classes, classes): a row is their own class, a column the model's.

    The mistakes are those that the model was surest of: uint8 images (n, channels, height, width), their labels, what the model
    said, and its probability.
    """

    loss: float
    top1: float
    top5: float
    confusion: Tensor
    mistakes: Tensor
    labels: Tensor
    said: Tensor
    probability: Tensor

    def worst_pairs(self, number: int) -> list[tuple[int, int, int]]:
        """(images, own class, what the model said) of the commonest mistakes."""
        wrong = self.confusion - self.confusion.diag().diag()
        counts, places = wrong.flatten().topk(min(number, wrong.numel()))
        return [(int(n), *divmod(int(place), len(wrong))) for n, place in zip(counts, places, strict=True) if n]


def check_fits(trained: Trained, source: Source) -> None:
    """Raises `UserError` for images of another shape or other classes than the model's."""
    if source.classes != trained.classes:
        ours, theirs = (f"{len(names)} classes ({', '.join(names[:3])}, ...)" for names in (trained.classes, source.classes))
        raise UserError(f"--dataset: the model knows {ours}, {source.name} has {theirs}")
    shape = (trained.model.in_chans, *trained.model.img_size)
    if source.shape != shape:
        raise UserError(f"--dataset: the model reads images of shape {shape}, {source.name} has {source.shape}")


def judge(trained: Trained, dataset: Dataset) -> Judgement:
    """Test the model on the held-out images of `dataset`, which are normalised as those were that it was trained on.

    Raises:
        UserError: they have other classes or another shape.
    """
    check_fits(trained, dataset.source())
    dataset = replace(dataset, mean=trained.mean, std=trained.std)
    confusion = torch.zeros(len(trained.classes), len(trained.classes), dtype=torch.long)
    loss, hits, images = 0.0, 0, 0
    wrong: list[tuple[Tensor, ...]] = []
    for pixels, labels, scores in tested(trained.model, dataset, trained.config):
        pixels, labels, scores = pixels.cpu(), labels.cpu(), scores.cpu()
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        best = scores.topk(min(5, scores.shape[1])).indices
        hits += int((best == labels[:, None]).sum())
        images += len(labels)
        said = best[:, 0]
        confusion += torch.bincount(labels * len(confusion) + said, minlength=confusion.numel()).view_as(confusion)
        probability = scores.softmax(1).amax(1)
        at = (said != labels).nonzero()[:, 0]
        wrong.append((pixels[at], labels[at], said[at], probability[at]))
        surest = [torch.cat(each) for each in zip(*wrong, strict=True)]
        order = surest[3].argsort(descending=True, stable=True)[:SHOWN_MISTAKES]
        wrong = [tuple(each[order] for each in surest)]
    top1 = 100 * confusion.diag().sum().item() / images
    return Judgement(loss / images, top1, 100 * hits / images, confusion, *wrong[0])


@torch.no_grad()
def predict(trained: Trained, files: list[Path]) -> Iterator[tuple[Path, Tensor | Exception, Tensor | None]]:
    """For every file: the image as the model sees it, in [0, 1] (channels, height, width), and its probabilities (classes,).

    Instead of an image that cannot be read there is the reason.
    """
    device = trained.mean.device
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
    if not isinstance(attention, Attention):
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
