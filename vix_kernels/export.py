"""Models as programs for elsewhere: without this library, and as ONNX.

`torch.export` takes every function and module here, with a batch of any size, and so do torch.export.save and AOTInductor:

    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(program)

The operators stay what they are, with the backend of the device that the example lies on: the process that runs the program
imports vix_kernels before it loads it, and asks for no gradient. `decomposed` replaces them by plain PyTorch, for processes
that have only torch.

The number of tokens may be dynamic, too, where nothing fixes it as rotary tables, grids and the image size of a model do. Its
range then begins at the number of landmarks or agents, with the prefix, and ends below the rows of Linformer's projections;
with landmarks="pad_front" it is either multiples of num_landmarks or all others, as in the example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .commands import write_atomically
from .layout import Rotary, accumulator, joined
from .ops.fourier import fourier_mixing_reference
from .primitives.aggregate import aggregate_forward, aggregate_reference
from .primitives.broadcast import broadcast_forward, broadcast_reference
from .primitives.dft import dft_forward
from .primitives.landmarks import landmarks_forward
from .primitives.linear import (
    linear_aggregate_forward,
    linear_aggregate_reference,
    linear_broadcast_forward,
    linear_broadcast_reference,
)
from .primitives.pinv import pinv_forward, pinv_reference
from .primitives.project import project_forward, project_reference
from .primitives.rotate import rotate_forward, rotate_reference
from .primitives.token_conv import token_conv_forward

LARGEST = 3 * 2**29  # bytes of weights; those of larger models torch writes beside the file


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The same program in plain PyTorch, which runs where this library is not installed, and has gradients.

    Tokens x slots are in memory then. Sums and statistics stay float32 for narrower tokens.

    Args:
        program: what torch.export.export returned. Sizes that are dynamic stay so.

    Raises:
        ValueError: it holds an operator of a backward, or one that only strict export keeps (the drawing of random features);
            lists them.
    """
    return _replaced(program, REFERENCES)


def to_onnx(
    model: nn.Module, x: Tensor | tuple[Any, ...], path: str | Path, *, dynamic_shapes: Any = None, opset: int | None = None
) -> float | None:
    """Write `model` in evaluation mode to an ONNX file, and compare what onnxruntime makes of it with the model itself.

    Args:
        model: any module with modules or functions of this library in it, in float32 or float16; onnxruntime has few
            operators for others on a CPU. It is put in evaluation mode, and back.
        x: an example of its argument, or a tuple of all of them.
        path: of the file, which is written in one piece.
        dynamic_shapes: as torch.export.export takes them, such as
            ({0: Dim("batch"), 1: Dim("tokens", min=64, max=4096)},). Default: dimension 0 of every tensor is the batch, of any
            size, and all else is as in x.
        opset: version of ONNX's operators, from 18 on; default: what torch recommends.

    Returns:
        The largest relative error of an output, |onnx - model| / |model|; None where onnxruntime is not installed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came.
        RuntimeError: an output is off by more than half of its dtype's digits, or the model has an operator that torch cannot
            translate. Nothing is left at `path` then but what was there before.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"to_onnx needs {' and '.join(missing)}: pip install 'vix_kernels[export]'")
    args = x if isinstance(x, tuple) else (x,)
    if not any(isinstance(each, Tensor) for each in args):
        raise TypeError(f"x: expected a Tensor or a tuple of arguments, got {type(x).__name__} without any Tensor")
    runs = [args]
    if dynamic_shapes is None:
        args, dynamic_shapes = _any_batch(args)
        runs = [args, tuple(each[:1] if isinstance(each, Tensor) else each for each in args)]
    path, errors = Path(path), []
    with _evaluating(model), torch.no_grad():
        wanted = [_tensors(model(*each)) for each in runs]  # says what is wrong with x sooner and plainer than an export
        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
    size = sum(each.nbytes for each in program.state_dict.values())
    if size > LARGEST:
        raise ValueError(f"model: expected at most {LARGEST / 2**30:.1f} GiB of weights, got {size / 2**30:.1f} GiB")
    program = _replaced(program, REFERENCES | ONNX_REFERENCES)
    names = ["out"] if len(wanted[0]) == 1 else [f"out_{i}" for i in range(len(wanted[0]))]
    onnx = torch.onnx.export(
        program, dynamo=True, output_names=names, dynamic_shapes=dynamic_shapes, opset_version=opset, verbose=False
    )
    if opset not in (None, onnx.model.opset_imports[""]):  # torch says so in its log, and keeps another
        raise ValueError(f"opset: expected one that torch can write, such as {onnx.model.opset_imports['']}, got {opset}")

    def write(file: Path) -> None:
        onnx.save(file)
        if find_spec("onnxruntime") is not None:
            errors.extend(_compared(file, runs, wanted))

    write_atomically(path, write)
    return max(errors, default=None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _any_batch(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """args of at least two samples, since torch.export takes a 1 for a constant, and their dynamic_shapes."""
    shapes = [tuple(each.shape) for each in args if isinstance(each, Tensor)]
    if len({shape[:1] for shape in shapes}) > 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            f"x: expected tensors with one batch in front, or dynamic_shapes that say what is, got shapes {shapes}"
        )
    if shapes[0][0] == 1:
        args = tuple(torch.cat([each, each]) if isinstance(each, Tensor) else each for each in args)
    return args, tuple({0: Dim("batch")} if isinstance(each, Tensor) else None for each in args)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compared(file: Path, runs: list[tuple[Any, ...]], wanted: list[list[Tensor]]) -> Iterator[float]:
    """The relative errors of the outputs of every run.

    Raises:
        RuntimeError: one is too large.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for args, outputs in zip(runs, wanted, strict=True):
        results = session.run(None, dict(zip(names, (each.numpy() for each in _tensors(args)), strict=True)))
        for i, (out, result) in enumerate(zip(outputs, map(torch.from_numpy, results), strict=True)):
            exact = out.double()
            error = ((result.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
            bound = torch.finfo(out.dtype).eps ** 0.5 if out.is_floating_point() else 0.0
            if not error <= bound:  # NaN, too
                raise RuntimeError(
                    f"output {i}: expected the model's within a relative error of {bound:.1e}, got one of {error:.1e} from "
                    f"onnxruntime, for arguments of shapes {[tuple(each.shape) for each in _tensors(args)]}"
                )
            yield error


def _replaced(program: ExportedProgram, references: dict[Callable, Callable]) -> ExportedProgram:
    program = program.run_decompositions(dict(references))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    left = {
        str(node.target) for graph in graphs for node in graph.nodes if getattr(node.target, "namespace", "") == "vix_kernels"
    }
    if left:
        raise ValueError(f"program: expected one for inference, exported with strict=False, got {', '.join(sorted(left))}")
    return program


# What stands for an operator: its arguments, tokens widened as the kernels widen them.


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def _unused(like: Tensor, count: int) -> list[Tensor]:
    """Outputs that only a backward reads."""
    return [like.new_empty(0) for _ in range(count)]


def _aggregate(slots, k, v, mask, cos, sin, interleaved, scale, gaussian, backend):
    turn = dict(rotary=joined(cos, sin, interleaved))
    values, lse = aggregate_reference(slots, _wide(k), _wide(v), scale=scale, gaussian=gaussian, mask=mask, **turn)
    return values, lse, *_unused(values, 2)


def _broadcast(q, slots, values, slot_bias, cos, sin, interleaved, scale, v, conv_weight, mask, backend):
    options = dict(scale=scale, rotary=joined(cos, sin, interleaved))
    out = broadcast_reference(_wide(q), slots, values, slot_bias, **options)
    if v is not None:
        out = out + _token_conv(_wide(v), conv_weight, mask, backend)
    return out.to(q.dtype), *_unused(values, 2)


def _linear_aggregate(slots, k, v, mask, cos, sin, interleaved, feature_map, backend):
    turn = dict(rotary=joined(cos, sin, interleaved))
    return linear_aggregate_reference(slots, k, v, feature_map=feature_map, mask=mask, **turn)


def _linear_broadcast(q, slots, sums, norms, cos, sin, interleaved, feature_map, eps, backend):
    turn = dict(rotary=joined(cos, sin, interleaved))
    return linear_broadcast_reference(q, slots, sums, norms, feature_map=feature_map, eps=eps, **turn)


def _landmarks(
    q, k, q_mask, k_mask, cos, sin, interleaved, prefix, rows, mark_rows, mark_columns, adaptive, backend
):  # fmt: skip
    """By a product with the windows. landmarks_reference cuts one after the other: hundreds of nodes, and where the number of
    tokens is dynamic, a graph that is wrong for others."""

    def windows(size: int, count: int) -> Tensor:
        """Which places lie in which window, (count, size)."""
        first, at = (torch.arange(each, device=q.device) for each in (count, size))
        first = first[:, None]
        if adaptive:
            return (first * size // count <= at) & (at < ((first + 1) * size + count - 1) // count)
        starts, ends = (j * (size // count) + (j - count + size % count).clamp(min=0) for j in (first, first + 1))
        return (starts <= at) & (at < ends)

    def means(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        valid = x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
        wide = _wide(torch.where(valid[:, None, :, None], x, 0.0))
        if cos is not None:
            wide = rotate_reference(wide, Rotary(cos, sin, interleaved))
        up, along = windows(rows, mark_rows), windows((x.shape[2] - prefix) // rows, mark_columns)
        cells = (up[:, None, :, None] & along[None, :, None]).flatten(2).flatten(0, 1)
        sums, counts = cells.to(wide.dtype) @ wide[:, :, prefix:], valid[:, prefix:].float() @ cells.float().mT
        sums, counts = torch.cat([wide[:, :, :prefix], sums], 2), torch.cat([valid[:, :prefix].float(), counts], 1)
        return (sums / counts.clamp(min=1)[:, None, :, None]).to(x.dtype), counts

    (q_marks, q_counts), nothing = means(q, q_mask), q.new_empty(0)
    k_marks, k_counts = (nothing, nothing.float()) if k is None else means(k, k_mask)
    return q_marks, k_marks, q_counts, k_counts


def _pinv(q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init, backend):
    counts = dict(q_counts=q_counts, k_counts=k_counts)
    return pinv_reference(q_marks, k_marks, values, scale=scale, iterations=iterations, init=init, **counts)


def _project(key_projection, value_projection, k, v, mask, cos, sin, interleaved, backend):
    turn = dict(rotary=joined(cos, sin, interleaved))
    keys, values = project_reference(_wide(k), _wide(v), key_projection, value_projection, mask=mask, **turn)
    return keys.to(k.dtype), values


def _rotate(q, k, cos, sin, interleaved, inverse, backend):
    return tuple(rotate_reference(x, Rotary(cos, -sin if inverse else sin, interleaved)) for x in (q, k))


def _token_conv(v, weight, mask, backend):
    # Conv2d, not token_conv_reference's windows, for which onnxruntime needs 15 times as long: its gradient is not asked for.
    x = _wide(v if mask is None else torch.where(mask[:, None, :, None], v, 0.0))
    return F.conv2d(x, weight.to(x.dtype), padding=(weight.shape[2] // 2, 0), groups=v.shape[1]).to(v.dtype)


def _dft(x, ortho, backend, transform=fourier_mixing_reference):
    y = transform(_wide(x))
    # norm="ortho" would take the number of tokens for a constant.
    return (y * (x.shape[1] * x.shape[2]) ** -0.5 if ortho else y).to(x.dtype)


def _transform_by_products(x: Tensor) -> Tensor:
    """C x C' - S x S' with the cosines and sines of the tokens and of the channels.

    onnxruntime's DFT needs 40 times as long for most numbers of tokens, and loses two more digits.
    """

    def table(size: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(size, device=x.device)
        count = at[-1] + 1  # a remainder by a dynamic `size` itself is not translated
        # Whole turns go while they are integers, which costs no digits.
        angles = (at[:, None] * at % count).to(x.dtype) * (2 * math.pi) / count
        return angles.cos(), angles.sin()

    (cos, sin), (across_cos, across_sin) = (table(size) for size in x.shape[1:])
    return cos @ (x @ across_cos) - sin @ (x @ across_sin)


REFERENCES: dict[Callable, Callable] = {
    aggregate_forward.registered: _aggregate,
    broadcast_forward.registered: _broadcast,
    linear_aggregate_forward.registered: _linear_aggregate,
    linear_broadcast_forward.registered: _linear_broadcast,
    landmarks_forward.registered: _landmarks,
    pinv_forward.registered: _pinv,
    project_forward.registered: _project,
    rotate_forward.registered: _rotate,
    token_conv_forward.registered: _token_conv,
    dft_forward.registered: _dft,
}
ONNX_REFERENCES: dict[Callable, Callable] = {dft_forward.registered: partial(_dft, transform=_transform_by_products)}
