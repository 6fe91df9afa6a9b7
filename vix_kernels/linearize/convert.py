"""Convert the softmax attention of a trained model to linear-cost attention."""

from __future__ import annotations

import copy
import math
import operator
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..integrations.drop_in import DropIn
from ..integrations.hosts import Snapshot
from ..integrations.speed import call
from ..integrations.swap import Softmaxed, holders, replace_attention
from ..nn.core import CORES, Mounted
from ..training.parallel import Ranks, connected
from ..training.teacher import distance
from .batches import Batches, check_same, checksum, drawn, endless, output, part_of, size_of
from .checks import check_arguments
from .losses import distilled, has_classes, schedule
from .report import LayerReport, Report
from .state import Progress, copy_weights, weights_checksum
from .transfer import collect, fitting, ignore, initialize, layer_of, measure, softmax, transferring

LEARNING_RATE, BETAS = 0.1, (0.9, 0.95)
GAUSSIAN = 0.5  # default of `gaussian`, the factor of |k|^2 / 2; training this factor resulted in values from 0.35 to 0.54
FIRST_SAMPLES = 64  # samples from which the features are initialized


def linearize(
    model: nn.Module,
    batches: Batches,
    *,
    op: str = "feature",
    layers: Sequence[str] | None = None,
    steps: int = 400,
    finetune_steps: int = 0,
    distill: str = "soft",
    finetune_lr: float = 1e-4,
    max_error: float | None = None,
    eval_batches: Batches | None = None,
    eval_samples: int = 512,
    output: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Replace a trained model's softmax attention with linear-cost attention in place, and fit the new attention to the old.

        report = linearize(model, lambda: loader, num_features=32)

    The model can be from timm, transformers or vix_kernels.models, or contain nn.MultiheadAttention. With op="feature", each
    layer learns features that make its output close to the output of softmax attention for the same q, k and v (Hedgehog, arXiv
    2402.04347). The weights of the model do not change unless finetune_steps > 0. Class and register tokens use exact softmax
    attention, unless exact_prefix=False or op="linear". With op="nystrom", there are no features to learn. Instead, `linearize`
    tries landmarks on the token grid and in segments of the sequence, and keeps the placement with the smaller error in each
    layer. Under torchrun, each batch is split among the processes, so all processes must receive the same batches.

    Args:
        model: the trained model. It stays on its device.
        batches: a function that returns a fresh iterator over batches, always in the same order. A batch is a tensor, a tuple
            whose first item is the input, or a dict of the model's arguments. In total, 256 to 512 samples in batches of 16
            suffice.
        op: the new attention method, such as "feature", "nystrom" or "performer" (random features, which are not trained).
        layers: names or patterns of the attention layers to convert, such as ["blocks.1*"]. None: all layers.
        steps: number of training steps, each with one batch.
        finetune_steps: number of fine-tuning steps, which follow the training steps. They train all weights that require
            gradients, so that the model reproduces the output of the original model. Models benefit most if they use mean
            pooling and have no class or register tokens with exact softmax attention. If finetune_steps > 0, a copy of the
            original model is kept in memory.
        distill: the output that the fine-tuning steps reproduce. "soft": the class probabilities, or the output itself if the
            model is not a classifier. "features": the result of model.forward_features.
        finetune_lr: learning rate of the fine-tuning steps.
        max_error: layers with a larger relative squared error keep softmax attention. For "nystrom", each layer uses the
            smallest number of landmarks with an error of at most max_error, unless num_landmarks is given.
        eval_batches: held-out batches for the report. Defaults to `batches`.
        eval_samples: number of samples for the errors of the layers and the comparison with the original model, rounded up to
            whole batches.
        output: a folder for checkpoints. A call with the same settings continues an interrupted conversion in this folder.
        overwrite: whether to start again if `output` contains a conversion.
        seed: random seed for initializing the features.
        progress: whether to show a progress bar. By default, it is shown only on a terminal.
        options: options of the new attention method, such as num_features=32 or exact_prefix=False. See
            vix_kernels.integrations.drop_in.DropIn.

    Returns:
        a Report. `print(report)` shows a table, and `report.draw(path)` saves a plot.

    Raises:
        ValueError, TypeError: an argument is invalid, or no layer can be converted. After any exception and after Ctrl-C, the
            model has its original modules and weights.
    """
    check_arguments(
        model, eval_batches, steps, finetune_steps, eval_samples, seed, max_error, distill, finetune_lr, options
    )  # fmt: skip
    start, seed = time.perf_counter(), operator.index(seed)
    snapshot, training = Snapshot(model), {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if finetune_steps else None
    if isinstance(op, str) and op in CORES and "seed" in CORES[op].options():
        options = dict(seed=seed) | options
    if op == "feature":
        options = dict(gaussian=GAUSSIAN) | options
    with torch.inference_mode(False), connected() as ranks:
        try:
            with torch.no_grad():
                weights = 0 if output is None else weights_checksum(model)  # only checkpoints need the checksum
                conversion = Conversion(model, batches, op, layers, options, ranks, seed, max_error, snapshot)
                conversion.draw(eval_batches or batches, eval_samples)
                settings = conversion.settings(
                    steps=steps, finetune_steps=finetune_steps, distill=distill, finetune_lr=finetune_lr, model=weights
                )
                saved = Progress.open(output, settings, ranks, overwrite)
                conversion.prepare(saved)
                conversion.fit(steps, saved, progress)
                conversion.choose(max_error)
            if teacher is not None:
                with torch.enable_grad():
                    conversion.finetune(teacher, finetune_steps, finetune_lr, distill, saved, progress)
            conversion.finish(teacher)
            for parameter in conversion.trained:
                parameter.grad = None
            conversion.report.seconds = time.perf_counter() - start
        except BaseException:
            snapshot.restore()
            if teacher is not None:
                copy_weights(teacher, model)
            raise
        finally:
            for module, mode in training.items():
                module.training = mode
            for parameter, grad in gradients.items():
                parameter.grad = grad
    return conversion.report


class Conversion:
    """A conversion in progress. Call draw, prepare, fit, choose, finetune (optional) and finish in this order."""

    def __init__(
        self, model: nn.Module, batches: Batches, op: str, layers: Sequence[str] | None, options: dict[str, Any], ranks: Ranks,
        seed: int, max_error: float | None, snapshot: Snapshot,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.op, self.options, self.ranks, self.seed = model, batches, op, options, ranks, seed
        self.max_error, self.snapshot = max_error, snapshot
        self.first = next(endless(batches, ranks.world))
        check_same("batches", [self.first], ranks)
        before = [name for name, holder in holders(model).items() if isinstance(holder, DropIn)]
        replaced = replace_attention(model, op, layers=layers, retrain=True, **options)
        for name in before:
            if replaced.attentions.pop(name, None):
                replaced.refused[name] = "its softmax attention is already replaced"
        snapshot.restore(before)
        model.eval()
        found = holders(model)
        several = max_error is not None
        self.layers = [layer_of(name, found[name], op, options, several) for name in replaced.attentions]
        if not self.layers:
            raise ValueError("model: expected softmax attention, got a model whose attention is already replaced")
        for layer in self.layers:
            layer.holder.widen()
        self.report = Report(op, refused=dict(replaced.refused))
        self.eval_batches: list[Any] = []
        if ranks.world > 1:
            self.check_part()

    def check_part(self) -> None:
        """Check that the batch size in every layer is proportional to that of the input, so that a batch can be split."""
        transferring(self.layers, ignore)
        self.run([self.first])
        part, before, error = self.part(self.first), [layer.batch for layer in self.layers], None
        try:
            self.run([part])
        except Exception as caught:  # for example, because too few tokens are left for the position embedding
            error = caught
        whole, size = size_of(self.first), size_of(part)
        divided = all(layer.batch * whole == batch * size for layer, batch in zip(self.layers, before, strict=True))
        if self.ranks.largest(int(error is not None or not divided)):  # all processes must raise the error
            raise ValueError(
                f"batches: expected samples in dimension 0, which {self.ranks.world} processes split, got another layout, "
                "such as that of nn.MultiheadAttention(batch_first=False): convert the model in one process"
            ) from error

    def settings(self, **given: Any) -> dict[str, Any]:
        """Return the settings that decide whether a call can continue an interrupted conversion (see `Progress.open`)."""
        return given | dict(
            op=self.op, options=repr(sorted(self.options.items())), seed=self.seed, layers=[each.name for each in self.layers],
            max_error=self.max_error, eval_batches=checksum(self.eval_batches),
        )  # fmt: skip

    def draw(self, eval_batches: Batches, eval_samples: int) -> None:
        """Collect batches for the report, with at least `eval_samples` samples in total if there are enough."""
        name, count = "batches" if eval_batches is self.batches else "eval_batches", 0
        for batch in drawn(name, eval_batches, self.ranks.world):
            self.eval_batches.append(batch)
            count += size_of(batch)
            if count >= eval_samples:
                break
        check_same(name, self.eval_batches, self.ranks)
        if not count:
            raise ValueError(f"{name}: expected a function that returns at least one batch, got none")
        self.report.samples = count

    def prepare(self, saved: Progress) -> None:
        """Measure the errors before training, and initialize the features."""
        self.errors_before = {}
        transferring(self.layers, measure)
        self.run(map(self.part, self.eval_batches))
        self.drop_refused()
        for layer in self.layers:
            self.errors_before[layer.name] = layer.relative_errors(self.ranks)
        saved.begin()
        if saved.saved.get("fit") or not self.trained:
            return
        transferring(self.layers, collect)
        count = 0
        for batch in endless(self.batches):
            self.run([batch])  # every process uses the same samples
            count += size_of(batch)
            if count >= FIRST_SAMPLES:
                break
        for number, layer in enumerate(self.layers):
            if self.op == "feature":
                initialize(layer, self.seed + number)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers for parameter in layer.parameters]

    def drop_refused(self) -> None:
        """If a layer cannot be converted, move it from `layers` to `refused`, and add the reason to the report."""
        for layer in self.layers:
            if layer.tokens < 2 and not layer.reason:
                layer.reason = f"expected at least 2 tokens, got {layer.tokens}"
        self.refused = [layer for layer in self.layers if layer.reason]
        self.layers = [layer for layer in self.layers if not layer.reason]
        for layer in self.refused:
            self.report.refused[layer.name] = layer.reason
        for layer in self.layers:
            for name in ("num_features", "num_landmarks"):
                slots = getattr(layer.students[0], name, 0) or 0
                if slots >= layer.tokens and not self.report.warnings:
                    self.report.warnings.append(f"{name}={slots} saves nothing, because there are {layer.tokens} tokens")
        if not self.layers:
            reasons = "; ".join(dict.fromkeys(self.report.refused.values())) or "no attention"
            raise ValueError(f"model: expected at least one attention layer that can be converted, got {reasons}")

    def part(self, batch: Any) -> Any:
        """Return the part of a batch that belongs to this process."""
        return part_of(batch, self.ranks.rank, self.ranks.world)

    @torch.no_grad()
    def run(self, batches: Any) -> None:
        for batch in batches:
            call(self.model, batch)

    def fit(self, steps: int, saved: Progress, progress: bool | None) -> None:
        """Train the parameters of all layers at once. Every layer has a separate loss."""
        parameters = self.trained
        if not parameters:
            return
        transferring(self.layers, fitting(self.ranks))
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=BETAS)
        begin = saved.restore("fit", parameters, optimizer)
        with self.bar(steps, begin, "fit", progress) as bar:
            for step, batch in enumerate(saved.following(endless(self.batches, self.ranks.world), steps), start=begin):
                optimizer.zero_grad()
                self.run([self.part(batch)])
                self.add_gradients(parameters)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * schedule(step, steps)
                optimizer.step()
                bar.update()
                saved.after_step("fit", step + 1, steps, parameters, optimizer)
        self.report.steps = steps

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients over all processes."""
        for parameter in parameters:
            if parameter.grad is None:  # the layer was not called
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks.world > 1:
            flat = self.ranks.sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
            for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(grad.view_as(parameter))

    def choose(self, max_error: float | None) -> None:
        """Measure the final errors. Choose a candidate core for each layer.

        Without `max_error`, choose the core with the smallest error. With `max_error`, choose the core with the fewest
        landmarks among those whose error is at most `max_error`. A layer without such a core keeps softmax attention.
        """
        after = self.errors_before
        if self.trained:
            transferring(self.layers, measure)
            self.run(map(self.part, self.eval_batches))
            after = {layer.name: layer.relative_errors(self.ranks) for layer in self.layers}
        kept = [layer.name for layer in self.refused]
        for layer in self.layers:
            errors = after[layer.name]
            if not all(map(math.isfinite, errors)):
                raise ValueError(f"batches: expected finite values, got an error of {layer.name} that is not finite")
            best = sorted(range(len(errors)), key=lambda i: (getattr(layer.students[i], "num_landmarks", 0), errors[i]))
            allowed = [i for i in best if max_error is None or errors[i] <= max_error]
            at = allowed[0] if allowed and max_error is not None else min(best, key=errors.__getitem__)
            layer.holder.core = layer.students[at]
            if at >= layer.on_grid and isinstance(layer.holder, DropIn):
                layer.holder.grid = None
            before = self.errors_before[layer.name][at]
            converted = bool(allowed)
            attention = describe(layer.holder) if converted else f"softmax, because the error exceeds {max_error:g}"
            self.report.layers[layer.name] = LayerReport(layer.tokens, before, errors[at], attention, converted)
            if not converted:
                kept.append(layer.name)
        self.snapshot.restore(kept)
        self.model.eval()
        self.layers = [layer for layer in self.layers if layer.name not in kept]
        if not self.layers:
            least = min(each.after for each in self.report.layers.values())
            raise ValueError(f"max_error: expected at least the smallest error of a layer, {least:.3g}, got {max_error}")

    def finetune(self, teacher: nn.Module, steps: int, lr: float, distill: str, saved: Progress, progress: bool | None) -> None:
        """Train all weights that require gradients, so that the model reproduces the output of the teacher."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"finetune_steps: expected 0 for a model whose weights require no gradients, got {steps}")
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        begin = saved.restore("finetune", parameters, optimizer)
        of = distilled(distill)
        with self.bar(steps, begin, "finetune", progress) as bar:
            for step, batch in enumerate(saved.following(endless(self.batches, self.ranks.world), steps), start=begin):
                whole, batch = size_of(batch), self.part(batch)
                with torch.no_grad():
                    expected = of(teacher, batch)
                optimizer.zero_grad()
                torch.clear_autocast_cache()  # otherwise, the cache could contain cast weights of the previous step
                actual = of(self.model, batch)
                loss = distance(actual, expected, distill if has_classes(self.model, actual) else "features") / whole
                loss.backward()
                self.add_gradients(parameters)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(step, steps)
                optimizer.step()
                bar.update()
                saved.after_step("finetune", step + 1, steps, parameters, optimizer)
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise ValueError("finetune_lr: expected a rate with which training converges, got weights that are not finite")
        self.report.steps += steps

    def finish(self, teacher: nn.Module | None) -> None:
        """Compare the model's outputs with the teacher's, time the model, and store the results in the report.

        If `teacher` is None, the weights have not changed, so the model with softmax attention is the teacher.
        """
        torch.clear_autocast_cache()
        report, agreed, divergence, total, classes = self.report, 0, 0.0, 0.0, False
        for batch in map(self.part, self.eval_batches):
            out = output(self.model, batch)
            if teacher is not None:
                expected = output(teacher, batch)
            else:
                with softmax(self.layers):
                    expected = output(self.model, batch)
            classes = has_classes(self.model, out)
            if classes:
                agreed += int((out.argmax(1) == expected.argmax(1)).sum())
                divergence += distance(out, expected, "soft").item()
                total += len(out)
            else:
                divergence += (out - expected).square().sum().item()
                total += expected.square().sum().item()
        agreed, divergence, total = self.ranks.sum(torch.tensor([agreed, divergence, total], dtype=torch.float64)).tolist()
        report.agreement = 100 * agreed / total if classes else None
        report.divergence = divergence / total if total else 0.0
        softmaxed = Softmaxed(self.model, [layer.name for layer in self.layers])
        report.add_times(self.model, self.first, lambda: softmaxed)

    def bar(self, total: int, initial: int, name: str, progress: bool | None) -> tqdm:
        hidden = None if progress is None else not progress  # with None, tqdm shows the bar only on a terminal
        return tqdm(
            total=total, initial=initial, desc=name, unit="step", leave=False, disable=hidden if self.ranks.first else True
        )


def describe(holder: Mounted) -> str:
    return holder.describe() if isinstance(holder, DropIn) else holder.core.describe()
