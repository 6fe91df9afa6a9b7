"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import Config, UserError
from .parallel import placed_like


class Optimizer:
    """The optimizer of a run: AdamW for all parameters, or a combination of Muon and AdamW.

    With opt="muon", Muon (https://kellerjordan.github.io/posts/muon) updates all weight matrices except those of the classifier
    head and those in `model.no_weight_decay()`. AdamW updates all other parameters. Muon's updates are scaled to the size of
    AdamW's updates (arXiv:2502.16982), so both use the same learning rate. Biases, norms and the parameters in
    `model.no_weight_decay()` have no weight decay.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        exempt = model.no_weight_decay()
        heads = list(model.get_classifier().parameters())
        head = {id(parameter) for parameter in heads}
        scales = layer_scales(list(self.names.values()), {self.names[p] for p in heads}, config.layer_decay)
        adamw: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)  # by weight decay and learning rate factor
        muon: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter, name in self.names.items():
            if parameter.ndim <= 1 or name in exempt or name.endswith("feature_bias"):
                adamw[0.0, scales[name]].append(parameter)
            elif config.opt == "muon" and parameter.ndim == 2 and id(parameter) not in head:
                muon[scales[name]].append(parameter)
            else:
                adamw[config.weight_decay, scales[name]].append(parameter)
        groups = [{"params": each, "weight_decay": decay, "scale": scale} for (decay, scale), each in adamw.items()]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr)]
        if muon:
            groups = [{"params": each, "scale": scale} for scale, each in muon.items()]
            options = dict(lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(torch.optim.Muon(groups, **options))

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self, lr: float, scaler: torch.amp.GradScaler, clip_grad: float) -> None:
        """Unscale the gradients, clip their norm unless `clip_grad` is 0, and update the weights."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group["scale"]
            scaler.unscale_(part)
        if clip_grad:
            nn.utils.clip_grad_norm_(self.names, clip_grad)
        for part in self.parts:
            scaler.step(part)
        scaler.update()

    def state_dict(self) -> dict[str, Tensor]:
        """Return a dict that maps names such as "head.weight:exp_avg" to tensors. The names do not depend on the sharding."""
        return {
            f"{self.names[parameter]}:{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`.

        Raises:
            UserError: `saved` is from a different model or optimizer.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        owners = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for part in self.parts:
            part.state.clear()
        for entry, value in saved.items():
            name, _, key = entry.rpartition(":")
            parameter = parameters.get(name)
            if parameter is None or value.shape not in (parameter.shape, ()):
                raise UserError(f"--resume: the checkpoint does not fit the model: it has optimizer state for {entry}")
            if (key == "momentum_buffer") != isinstance(owners[parameter], torch.optim.Muon):
                raise UserError("--resume: the checkpoint is from a run with a different --opt")
            owners[parameter].state[parameter][key] = placed_like(parameter, value)


def layer_scales(names: Sequence[str], head: Collection[str], decay: float) -> dict[str, float]:
    """Return the learning rate factor of each parameter.

    The factor is 1 for the head and the parameters after the last block, such as those of a norm or pooling layer. It is
    `decay` for the last block, `decay` squared for the block before it, and so on. Parameters between two blocks have the
    factor of the earlier block. Position embeddings and all parameters before the first block, such as those of the
    patch embedding, have the smallest factor.

    Args:
        names: the names of the parameters, in the order of `model.named_parameters()`.
        head: the names of the parameters of the head.

    Raises:
        UserError: `decay` is not 1, and the model has no blocks.
    """
    blocks: dict[str, int] = {}
    layers: dict[str, int] = {}
    top = set(head)  # the head, and the parameters after the last block that was found
    for name in names:
        if found := re.match(r"(.*\b(?:\w*blocks\w*|layers?)\.\d+)\.", name):  # such as blocks_token_only.0 in cait
            layers[name] = blocks.setdefault(found[1], len(blocks) + 1)
            top = set(head)
        elif re.match(r"(host\.)?pos_", name):  # twins registers its position encodings after the blocks
            layers[name] = 0
        else:
            layers[name] = len(blocks)
            top.add(name)
    if decay != 1 and not blocks:
        raise UserError("--layer-decay: expected 1 for a model without blocks, got " + f"{decay:g}")
    return {name: 1.0 if name in top else decay ** (len(blocks) + 1 - layer) for name, layer in layers.items()}


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Return the learning rate for a step.

    It rises linearly to `lr` during the warm-up. With sched="constant", it then stays constant. With sched="cosine", it decays
    to `end_lr` along half a cosine wave, and stays there during the cool-down.
    """
    warmup, end = (round(n * steps_per_epoch) for n in (config.warmup_epochs, config.epochs - config.cooldown_epochs))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.sched == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    return config.end_lr + (config.lr - config.end_lr) * (1 + math.cos(math.pi * done)) / 2
