"""Report which attention layers were replaced, and time the model with softmax attention and with the new attention."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import InitVar, dataclass, field
from typing import Any

from torch import nn

from ..ops.checks import check_integer
from .drop_in import DropIn
from .speed import SlowerWarning, Speed, expected, measure


@dataclass
class Report:
    """Lists which attention layers of a model were replaced, and why others could not be replaced.

    Attributes:
        attention: a short description of the new attention.
        attentions: maps the name of each replaced module to a description of its attention.
        refused: reasons why modules could not be replaced, by module name.
        tokens: maps the name of each replaced module to its number of tokens, if known. Before a call to `measure`, this is the
            number at the model's configured image size. After the call, it is the number in the measured batch.
        speed: the result of the latest call to `measure`, or None before the first call.
        warnings: the messages of the SlowerWarnings that the replacement issued.
    """

    attention: str
    attentions: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    model: InitVar[nn.Module | None] = None
    speed: Speed | None = None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self, model: nn.Module | None) -> None:
        # The model, and a pair of the attention and the head width. These are not dataclass fields, and __getstate__ sets them
        # to None in copies and pickles, because a copy of a report should not contain a model.
        self._model, self._kind = model, None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None, "_kind": None}

    @property
    def replaced(self) -> list[str]:
        """The names of the replaced modules."""
        return list(self.attentions)

    def __str__(self) -> str:
        lines = [f"{self.attention}: {len(self.replaced)} replaced, {len(self.refused)} not replaced"]
        for name, attention in self.attentions.items():
            lines.append(f"  {name}: {attention}" + (f", {self.tokens[name]} tokens" if name in self.tokens else ""))
        lines += [f"  {name} not replaced: {reason}" for name, reason in self.refused.items()]
        lines += [str(self.speed)] if self.speed else [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def measure(self, batch: Any, *, rounds: int = 5) -> Speed:
        """Time the model and each replaced layer on `batch`, alternately with the new attention and with softmax attention.

        The model runs on its current device, in evaluation mode, without gradients and without compilation. For softmax
        attention, modules whose class was replaced run their original code. The model is not changed. After this call,
        `print(report)` includes the times.

        Args:
            batch: a batch of typical size. It is a tensor, a tuple whose first item is the input, or a dict of the model's
                arguments.
            rounds: the number of measured calls with each attention method, after one warm-up call. The times of the model and
                of its layers are measured in separate calls.

        Returns:
            a Speed with the times. `print` shows it as a table.

        Raises:
            ValueError: the report lists no layers whose softmax attention was replaced, a replaced layer was changed later,
                `batch` is empty, or the parameters of the model are on the meta device.
            TypeError: `batch` contains no tensor.
        """
        from .hosts import module_of
        from .swap import Softmaxed, holders

        check_integer("rounds", rounds, 1)
        found = {} if self._model is None else holders(self._model)
        op = self._kind[0].op if self._kind else ""
        changed = [name for name in self.attentions if name not in found or found[name].core.name != op]
        if changed and found:
            raise ValueError(f"report: expected a model with the replaced layers, got one in which {changed[0]} was changed")
        if changed:
            raise ValueError(
                "report: expected the report of a model whose softmax attention is replaced, got one without replaced "
                f"attention ({self.attention})"
            )
        found = {name: found[name] for name in self.attentions}
        modules, softmax = {name: module_of(self._model, name) for name in found}, Softmaxed(self._model, found)
        self.speed = measure(self._model, batch, lambda: softmax, found, modules, rounds=rounds)
        self.tokens |= {name: layer.tokens for name, layer in self.speed.layers.items() if layer.tokens is not None}
        if self.speed.ratio > 1 and (reason := self._expected()):
            self.speed.note = f"according to docs/choosing.md, {reason}"
        return self.speed

    def expect(self, attention: DropIn, width: int, stacklevel: int) -> None:
        """Issue a SlowerWarning if `attention` is expected to be slower than softmax attention in all layers.

        Args:
            attention: the new attention.
            width: width of a head.
            stacklevel: as in warnings.warn, but 1 refers to the caller of this method.
        """
        self._kind = attention, width
        if len(self.tokens) < len(self.attentions):
            return
        if reason := self._expected():
            self.warnings.append(
                f"{attention.op} attention may be slower than softmax attention at {max(self.tokens.values())} tokens: "
                f"{reason}; report.measure(batch) times the model with both kinds of attention"
            )
            warnings.warn(self.warnings[-1], SlowerWarning, stacklevel=stacklevel + 1)

    def _expected(self) -> str:
        weight = None if self._model is None else next(self._model.parameters(), None)
        if weight is None or self._kind is None or not self.tokens:
            return ""
        attention, width = self._kind
        return expected(attention.op, attention.options, max(self.tokens.values()), width, weight.device.type)

    def checked(self, expected: str) -> Report:
        """Return this report, or raise ValueError if nothing was replaced.

        In the error message, `expected` describes a suitable model.
        """
        if self.replaced:
            return self
        reasons = Counter(self.refused.values())
        found = ", ".join(f"{count} times {reason}" for reason, count in reasons.items()) or "a model without any attention"
        raise ValueError(f"model: expected {expected}, got {found}")
