"""The report of a conversion: a table, a plot, and a time measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..commands import write_atomically
from ..integrations.speed import compare


@dataclass
class LayerReport:
    """The result for one attention layer.

    Attributes:
        tokens: the number of tokens.
        before: the relative squared error of the attention's output before training, excluding tokens with exact softmax
            attention.
        after: the same error after the features were trained, but before any fine-tuning steps.
        attention: a description of the new attention, or why softmax attention is kept.
        converted: whether the layer is converted.
    """

    tokens: int
    before: float
    after: float
    attention: str
    converted: bool = True


@dataclass
class Report:
    """The result of `linearize`.

    Attributes:
        op: the new attention method.
        layers: the result for each measured layer, keyed by layer name.
        refused: the reasons why layers cannot be converted, keyed by layer name.
        agreement: percentage of samples for which the converted model and the teacher predict the same class, or None if the
            model is not a classifier.
        divergence: mean Kullback-Leibler divergence KL(teacher || converted model) of the class probabilities. If the model is
            not a classifier, the relative squared error of the output.
        samples: the number of samples on which `agreement` and `divergence` were measured.
        steps, seconds: the number of training steps, and the duration of the conversion.
        milliseconds: the median times of a forward pass on one batch, as a pair (softmax attention, new attention).
        warnings: messages that explain why the converted model may not be faster than before.
    """

    op: str
    layers: dict[str, LayerReport] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    agreement: float | None = None
    divergence: float = 0.0
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    milliseconds: tuple[float, float] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[str]:
        """Names of the converted layers."""
        return [name for name, layer in self.layers.items() if layer.converted]

    def __str__(self) -> str:
        width = max(5, *(len(name) for name in self.layers)) if self.layers else 5
        lines = [f"{'layer':{width}}  tokens  error before    after  attention"]
        for name, each in self.layers.items():
            lines.append(f"{name:{width}}  {each.tokens:6}  {each.before:12.4f}  {each.after:7.4f}  {each.attention}")
        lines += [f"{name} not converted: {reason}" for name, reason in self.refused.items()]
        steps = f" after {self.steps} steps" if self.steps else ""
        lines.append(f"{len(self.converted)} of {len(self.layers)} layers converted to {self.op}{steps}, {self.seconds:.1f} s")
        if self.agreement is not None:
            lines.append(
                f"agreement with the teacher {self.agreement:.2f} %, KL {self.divergence:.2g}, on {self.samples:,} samples"
            )
        elif self.samples:
            lines.append(f"relative squared error of the output {self.divergence:.2g}, on {self.samples:,} samples")
        if self.milliseconds:
            softmax, linear = self.milliseconds
            lines.append(f"forward pass {linear:.1f} ms, {softmax / linear:.2f} times as fast as softmax ({softmax:.1f} ms)")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def draw(self, path: str | Path) -> None:
        """Plot the errors of the layers before and after fitting, and save the plot to `path` as a PNG file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.5, 0.5 * len(self.layers) + 2), 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        places = range(len(self.layers))
        for offset, name, color in ((-0.2, "before", "0.7"), (0.2, "after", "C0")):
            heights = [getattr(each, name) for each in self.layers.values()]
            axes.bar([place + offset for place in places], heights, 0.4, label=f"{name} fitting", color=color)
        axes.set_xticks(places, [str(i) + "*" * (not each.converted) for i, each in enumerate(self.layers.values())])
        kept = " (* keeps softmax)" if len(self.converted) < len(self.layers) else ""
        axes.set(yscale="log", xlabel=f"attention layer{kept}", ylabel="relative squared error of the attention")
        title = f"{self.op}, {self.steps} steps" if self.steps else self.op
        agreement = "" if self.agreement is None else f"\nagreement with the teacher {self.agreement:.2f} %"
        axes.set_title(title + agreement, loc="left", parse_math=False)
        axes.set_ylim(top=5 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, loc="upper left", ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=150))

    def add_times(self, model: nn.Module, batch: Any, with_softmax: Callable[[], Any], rounds: int = 3) -> None:
        """Time a forward pass on `batch` with softmax attention and with the new attention.

        Add a warning if the new attention is slower. `with_softmax` returns a context manager that makes the model compute
        softmax attention.
        """
        self.milliseconds = compare(model, batch, with_softmax, rounds=rounds)
        if self.milliseconds[1] > self.milliseconds[0]:
            tokens = max(each.tokens for each in self.layers.values())
            self.warnings.append(
                f"the converted model is slower than softmax attention at {tokens} tokens; linear-cost attention is "
                "faster for longer inputs"
            )
