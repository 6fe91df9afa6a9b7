"""Knowledge distillation: learn from the outputs of a trained model (Hinton et al., arXiv:1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config, UserError
from .data import Dataset
from .trained import Trained, load_trained


class Teacher:
    """A trained model whose class probabilities or features a student learns to reproduce.

    Args:
        config: the settings of the student's run.
        model: the student.
        dataset: the dataset, whose mean and std normalize the student's inputs.

    Raises:
        UserError: the teacher cannot be loaded, or its image shape, classes or number of features differ from the student's.
    """

    def __init__(self, config: Config, model: nn.Module, dataset: Dataset, device: torch.device) -> None:
        self.config, self.dataset = config, dataset
        self.trained = load_teacher(config.teacher, device)
        shape, classes = (model.in_chans, *model.img_size), model.num_classes
        if self.trained.shape != shape:
            raise UserError(f"--teacher: expected a model for images of shape {shape}, got {self.trained.shape}")
        if self.trained.model.num_classes != classes:
            raise UserError(f"--teacher: expected a model with {classes} classes, got {self.trained.model.num_classes}")
        if self.trained.classes not in (None, dataset.classes):
            names = ", ".join(self.trained.classes[:3])
            raise UserError(f"--teacher: expected a model of the classes of {dataset.name}, got {names}, ...")
        if config.distill == "features":
            self.heads = [heads(each) for each in (model, self.trained.model)]
            expected, found = (" + ".join(str(head.in_features) for head in each) for each in self.heads)
            if expected != found:
                raise UserError(f"--distill: expected a teacher with {expected} features before the head, got {found}")
            self.features: dict[nn.Module, Tensor] = {}
            for head in (*self.heads[0], *self.heads[1]):
                head.register_forward_pre_hook(lambda _, args, head=head: self.features.update({head: args[0]}))

    def distance(self, inputs: Tensor, logits: Tensor) -> Tensor:
        """Return the distance between the student and the teacher, summed over the images.

        With --distill soft, this is the Kullback-Leibler divergence of the class probabilities. With --distill features, it is
        the relative squared error of the features before the classifier heads.

        Args:
            inputs: the normalized images that the student received.
            logits: the student's output.
        """
        if self.trained.mean is not None:  # otherwise, assume that the teacher was trained with the student's mean and std
            inputs = self.trained.inputs(inputs * self.dataset.std + self.dataset.mean)
        with torch.no_grad():
            expected = self.trained.model(inputs).float()
        if self.config.distill == "features":
            logits, expected = (torch.cat([self.features[head] for head in each], -1).float() for each in self.heads)
        return distance(logits, expected, self.config.distill)


def heads(model: nn.Module) -> list[nn.Module]:
    """Return the classifier heads of `model`. timm's distilled models have two.

    Raises:
        UserError: a head has no attribute `in_features`, so it is not a linear layer.
    """
    head = model.get_classifier()
    found = list(head) if isinstance(head, nn.ModuleList) else [head]
    if other := [type(each).__name__ for each in found if not hasattr(each, "in_features")]:
        raise UserError(f"--distill: expected soft for a model whose head is not a linear layer, got features and {other[0]}")
    return found


def distance(actual: Tensor, expected: Tensor, distill: str) -> Tensor:
    """Return the distance between `actual` and `expected`, summed over the samples.

    This is the Kullback-Leibler divergence if `distill` is "soft" and the tensors are logits (batch, classes) for at least two
    classes. Otherwise, it is the squared error of each sample, divided by the squared norm of the sample in `expected`. If a
    sample is a single number, its error is not divided, because the number may be close to 0.
    """
    if distill == "soft" and actual.dim() == 2 and actual.shape[1] > 1:
        return F.kl_div(actual.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="sum")
    over = tuple(range(1, actual.dim()))
    errors = (actual - expected).square().sum(over)
    if actual.shape[1:].numel() == 1:
        return errors.sum()
    return (errors / expected.square().sum(over).clamp(min=1e-30)).sum()


def load_teacher(path: str, device: torch.device) -> Trained:
    try:
        trained = load_trained(path, device)
    except UserError as error:
        raise UserError(str(error).replace("--checkpoint", "--teacher", 1)) from error
    trained.model.requires_grad_(False)
    return trained
