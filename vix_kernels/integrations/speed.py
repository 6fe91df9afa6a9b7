"""Time a model with the new attention and with softmax attention, and look up break-even lengths."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import break_even
from ..measure.timing import in_turns
from ..nn.core import CORES
from .drop_in import DropIn

LABELS = {"labels", "label"}  # entries of a dict that are not passed to the model
Pair = tuple[float, float]  # times with softmax attention and with the new attention
Softmax = Callable[[], AbstractContextManager[Any]]  # returns a context manager that makes a model compute softmax attention


class SlowerWarning(UserWarning):
    """Warns that the new attention is expected to be slower than softmax attention."""


@dataclass
class LayerSpeed:
    """Times of one attention layer, including its linear layers, in milliseconds per call to the model.

    Attributes:
        tokens: the largest number of keys in a call, or None if the layer was not called.
        softmax, replaced: median times with softmax attention and with the new attention.
    """

    tokens: int | None = None
    softmax: float = 0.0
    replaced: float = 0.0

    @property
    def ratio(self) -> float:
        """The time with the new attention divided by the time with softmax attention, or NaN if the layer was not called."""
        return self.replaced / self.softmax if self.softmax else float("nan")


@dataclass
class Speed:
    """Times of a model with softmax attention and with the new attention.

    Attributes:
        softmax, replaced: median times of a forward pass, in milliseconds.
        layers: maps the name of each layer to its times.
        where: the device, the dtype and the number of samples.
        note: a phrase with the break-even length if the new attention was slower, as expected. Otherwise, an empty string.
    """

    softmax: float
    replaced: float
    layers: dict[str, LayerSpeed]
    where: str
    note: str = field(default="", repr=False)

    @property
    def ratio(self) -> float:
        """The time with the new attention divided by the time with softmax attention."""
        return self.replaced / self.softmax

    def __str__(self) -> str:
        width = max(len(name) for name in ("layer", *self.layers))
        lines = [f"{'layer':{width}}  tokens  softmax, ms  replaced, ms  ratio"]
        for name, each in self.layers.items():
            if each.tokens is None:
                lines.append(f"{name:{width}}  not called")
            else:
                times = f"{each.softmax:11.3f}  {each.replaced:12.3f}  {each.ratio:5.2f}"
                lines.append(f"{name:{width}}  {each.tokens:6}  {times}")
        tokens = sorted({each.tokens for each in self.layers.values() if each.tokens is not None})
        at = f" at {' to '.join(map(str, dict.fromkeys((tokens[0], tokens[-1]))))} tokens" if tokens else ""
        lines.append(
            f"the model takes {self.ratio:.2f} times as long as with softmax attention{at} ({self.replaced:.2f} and "
            f"{self.softmax:.2f} ms; {self.where})"
        )
        return "\n".join([*lines, self.note] if self.note else lines)


def tensors(batch: Any) -> list[Tensor]:
    """Return a list of the tensors in `batch`. `batch` is a tensor, a tuple or a dict."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return [x for x in values if isinstance(x, Tensor)]


def call(model: nn.Module, batch: Any) -> Any:
    """Return the output of the model for `batch`.

    `batch` is a tensor, a tuple whose first item is the input, or a dict of arguments. Labels are not passed to the model.
    """
    device = next(model.parameters()).device

    def moved(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    if isinstance(batch, Mapping):
        return model(**{name: moved(x) for name, x in batch.items() if name not in LABELS})
    return model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))


def compare(model: nn.Module, batch: Any, softmax: Softmax, *, rounds: int) -> Pair:
    """Return the median times of a call with softmax attention and with the new attention, in milliseconds.

    The two kinds of calls alternate.
    """
    device = next(model.parameters()).device

    def run() -> None:
        call(model, batch)
        wait(device)

    def run_softmax() -> None:
        with softmax():
            run()

    with torch.no_grad():
        times = in_turns({"softmax": run_softmax, "replaced": run}, rounds=rounds, clock=time.perf_counter)
    return times["softmax"].median, times["replaced"].median


def compare_layers(
    model: nn.Module, batch: Any, softmax: Softmax, holders: Mapping[str, nn.Module], modules: Mapping[str, nn.Module],
    *, rounds: int,
) -> dict[str, LayerSpeed]:  # fmt: skip
    """Return a dict that maps the name of each layer to its LayerSpeed. The arguments are as in `measure`."""
    device = next(model.parameters()).device
    layers = {name: LayerSpeed() for name in holders}
    samples: dict[str, dict[str, list[float]]] = {"softmax": defaultdict(list), "replaced": defaultdict(list)}

    def run(kind: str, context: Softmax) -> None:
        with context(), _stopwatch(modules, device) as elapsed:
            call(model, batch)
        for name, milliseconds in elapsed.items():
            samples[kind][name].append(milliseconds)

    with torch.no_grad(), _counted(holders, layers):
        functions = {"softmax": lambda: run("softmax", softmax), "replaced": lambda: run("replaced", nullcontext)}
        in_turns(functions, rounds=rounds)
    for name, layer in layers.items():
        times = [each[name][1:] for each in samples.values()]  # the first call is a warm-up
        if layer.tokens is not None and all(times):
            layer.softmax, layer.replaced = map(statistics.median, times)
        else:
            layers[name] = LayerSpeed()
    return layers


@contextmanager
def _counted(holders: Mapping[str, nn.Module], layers: dict[str, LayerSpeed]) -> Iterator[None]:
    """Inside the `with` block, set `layers[name].tokens` to the largest number of keys in a call to layer `name`."""

    def count(layer: LayerSpeed, holder: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = *args, *options.values()
        tokens = given[1].shape[2] if isinstance(holder, DropIn) else given[0].shape[1]  # the key, or the module's input
        layer.tokens = max(tokens, layer.tokens or 0)

    with ExitStack() as stack:
        for name, holder in holders.items():
            stack.enter_context(holder.register_forward_pre_hook(partial(count, layers[name]), with_kwargs=True))
        yield


@contextmanager
def _stopwatch(modules: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, float]]:
    """Yield an empty dict. On exit, it maps the name of each called module to the total time of its calls in ms."""
    marks: dict[str, list[Any]] = defaultdict(list)  # alternately the start and the end of a call
    elapsed: dict[str, float] = {}

    def mark(name: str, *call: Any) -> None:
        marks[name].append(_now(device))

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(partial(mark, name)))
            stack.enter_context(module.register_forward_hook(partial(mark, name), always_call=True))
        yield elapsed
    wait(device)
    for name, found in marks.items():
        elapsed[name] = sum(_between(begin, end) for begin, end in zip(found[::2], found[1::2], strict=True))


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished all work. Do nothing for other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) if isinstance(begin, torch.cuda.Event) else 1e3 * (end - begin)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode and disable gradients.

    On exit, restore training modes, RNG states and the token grids that each `DropIn.grid` recorded.

    Compiled modules run in eager mode, because code that was compiled earlier does not call the hooks that measure layers.
    """
    modes = {module: module.training for module in model.modules()}
    grids = {id(each.grid): each.grid for each in model.modules() if isinstance(each, DropIn) and each.grid is not None}
    sizes = {key: dict(grid.sizes) for key, grid in grids.items()}
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for key, grid in grids.items():
                grid.sizes = sizes[key]


def measure(
    model: nn.Module, batch: Any, softmax: Softmax, holders: Mapping[str, nn.Module], modules: Mapping[str, nn.Module],
    *, rounds: int,
) -> Speed:  # fmt: skip
    """Return the times of `model` and its layers for `batch`. The model is not changed.

    Args:
        batch: as in `call`.
        softmax: returns a context manager that makes the model compute softmax attention.
        holders: maps the name of each layer to the module that holds its core (see nn/core.py).
        modules: maps the name of each layer to its attention module.
        rounds: as in `Report.measure`.
    """
    from ..measure.machine import device_name  # not at the top, because it imports the specifications of all operators

    parameter = next(model.parameters())
    if parameter.is_meta:
        raise ValueError("model: expected a model with weights, got one on the meta device")
    found = [x for x in tensors(batch) if x.dim()]
    if found and not len(found[0]):
        raise ValueError("batch: expected at least one sample, got none")
    if not found:
        raise TypeError(f"batch: expected a tensor, or a tuple or dict of tensors, got {type(batch).__name__}")
    with undisturbed(model):
        times = compare(model, batch, softmax, rounds=rounds)
        layers = compare_layers(model, batch, softmax, holders, modules, rounds=rounds)
    dtype = str(parameter.dtype).removeprefix("torch.")
    where = f"{device_name(parameter.device.type)}, {dtype}, batch size {len(found[0])}"
    return Speed(*times, layers, where)


def expected(op: str, options: Mapping[str, Any], tokens: int, width: int, device: str) -> str:
    """If `op` is expected to be slower than softmax attention, return a phrase with its break-even length, otherwise "".

    Args:
        op, options: as in DropIn. Break-even lengths are known only for the default number of landmarks, features or agents.
            For other numbers, the result is "".
        tokens, width, device: the number of tokens, the width of a head and the type of the device.
    """
    usual = CORES[op].made("host")
    for name in ("num_landmarks", "num_features", "num_agents"):
        if name in options and options[name] != getattr(usual, name):
            return ""
    row = break_even.slower(op, tokens, width, device)
    if row is None:
        return ""
    if row.tokens.startswith(break_even.MORE):
        slower = "was not faster" if row.kind == "measured" else "is not predicted to be faster"
        return f"at head width {row.width}, {op} attention {slower} at up to {row.least - 1:,} tokens ({row.device})"
    faster = "was faster" if row.kind == "measured" else "is predicted to be faster"
    return f"at head width {row.width}, {op} attention {faster} from about {row.rounded} tokens ({row.device})"
