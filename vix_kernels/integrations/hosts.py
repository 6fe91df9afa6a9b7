"""What the doors have in common: which versions of a host they know, and the account of what was replaced."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from .drop_in import DropIn


def require(package: str, oldest: str) -> None:
    """Raises ImportError unless `package` is installed in version `oldest` or newer."""
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"this needs {package} {oldest} or newer: pip install {package}") from None
    if _numbers(found) < _numbers(oldest):
        raise ImportError(f"{package}: expected version {oldest} or newer, got {found}: pip install --upgrade {package}")


@contextmanager
def host(package: str, oldest: str) -> Iterator[None]:
    """Around the imports from a host: what a version does not have is an error that names the version.

    Raises:
        ImportError: it is not installed, older than `oldest`, or so much newer that what a door builds on has moved.
    """
    require(package, oldest)
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{package} {version(package)}: cannot import what vix_kernels builds on, which may have moved: {error}"
        ) from error


def require_call(package: str, kind: type[nn.Module], host: type[nn.Module]) -> None:
    """Raises ImportError unless `kind` takes all arguments of the `host` module that it stands in for."""
    ours, theirs = (list(inspect.signature(each.forward).parameters)[1:] for each in (kind, host))
    if not set(theirs) <= set(ours):
        raise ImportError(
            f"{package} {version(package)}: vix_kernels does not support this version: {host.__name__} is called with "
            f"({', '.join(theirs)}), expected ({', '.join(ours)})"
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


@dataclass
class Report:
    """What became of the attentions of a model.

    Attributes:
        attention: what stands in for them.
        replaced: names of the modules that were replaced.
        refused: names of those that were left as they are, each with the reason.
    """

    attention: str
    replaced: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.attention}: {len(self.replaced)} replaced, {len(self.refused)} left"]
        lines += [f"  {name}" for name in self.replaced]
        lines += [f"  {name} left: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)

    def checked(self, expected: str) -> Report:
        """This report, or ValueError where nothing was replaced: a model that goes on as it was is no success."""
        if self.replaced:
            return self
        reasons = Counter(self.refused.values())
        found = ", ".join(f"{count} times {reason}" for reason, count in reasons.items()) or "a model without any attention"
        raise ValueError(f"model: expected {expected}, got {found}")


def replace_each(
    model: nn.Module,
    attention: DropIn,
    *,
    reason_against: Callable[[nn.Module], str],
    put: Callable[[nn.Module, DropIn], None],
    expected: str,
) -> Report:
    """Put `attention` into every attention of `model` that there is no reason against, each layer with features of its own.

    Raises:
        ValueError: there was none; `expected` says what was looked for.
    """
    report = Report(repr(attention))
    for name, module in attentions(model):
        if reason := reason_against(module):
            report.refused[name] = reason
            continue
        put(module, attention.of_layer(len(report.replaced)))
        report.replaced.append(name)
    return report.checked(expected)


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` whose class calls itself an attention, with their names."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if re.search("Attention|Attn", kind) and "Block" not in kind:
            yield name or "(the model itself)", module
