"""Export models to plain PyTorch programs and to ONNX files.

Every function and module of this library can be exported with torch.export, saved with torch.export.save and compiled with
AOTInductor. The batch size can be dynamic:

    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(program)

The exported program contains this library's operators, with the backend that was selected for the example inputs. A process
must import vix_kernels before it loads the program. The program does not support gradients, so run it under torch.no_grad(). To
run a program where only PyTorch is installed, use `decomposed`, which replaces the operators with plain PyTorch.

The number of tokens can also be dynamic, unless rotary tables, a grid or a model's image size fix it. In its Dim, `min` must be
at least the number of landmarks or agents plus the number of prefix tokens. With Linformer attention, `max` must be at most the
number of rows of the projections. If each head has separate projections, `max` must be less than this number. With
landmarks="pad_front", if the number of tokens in the example is a multiple of num_landmarks, the program accepts only multiples
of num_landmarks. Otherwise, it accepts no multiples of num_landmarks.
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
from .layout import Pool, Rotary, accumulator, joined
from .ops.fourier import fourier_mixing_reference
from .primitives.aggregate import aggregate_forward, aggregate_reference
from .primitives.broadcast import broadcast_forward, broadcast_reference
from .primitives.dft import dft_forward
from .primitives.landmarks import landmarks_forward, landmarks_reference
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

LARGEST = 3 * 2**29  # bytes of weights; for larger models, torch would write the weights to a separate file


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Return an equivalent program that uses only PyTorch operators, runs without this library and supports gradients.

    The returned program materializes N x M matrices for N tokens and M features, landmarks, agents or projected keys. For
    16-bit dtypes, it still computes sums and statistics in float32.

    Args:
        program: the result of torch.export.export. Dynamic sizes stay dynamic.

    Raises:
        ValueError: the program contains an operator that cannot be replaced. This can be an operator of a backward pass or, in
            a strict export, the operator that draws random features. The message lists all such operators.
    """
    return _replaced(program, REFERENCES)


def to_onnx(
    model: nn.Module, x: Tensor | tuple[Any, ...], path: str | Path, *, dynamic_shapes: Any = None, opset: int | None = None
) -> float | None:
    """Export `model` in evaluation mode to an ONNX file, and compare the outputs of onnxruntime with those of `model`.

    Args:
        model: any module that uses modules or functions of this library, in float32 or float16. onnxruntime has few CPU
            operators for other dtypes. The training mode of every submodule is restored afterwards.
        x: an example input of the model, or a tuple of all arguments of the model.
        path: the file to write. It is written atomically.
        dynamic_shapes: as in torch.export.export, such as ({0: Dim("batch"), 1: Dim("tokens", min=64, max=4096)},). By default,
            dimension 0 of every tensor is the batch and can have any size, and all other sizes are fixed to those of x.
        opset: version of the ONNX operator set, at least 18. By default, the version that torch recommends.

    Returns:
        The largest relative error |onnx - model| / |model| over all outputs, or None if onnxruntime is not installed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: the relative error of an output exceeds the square root of its dtype's eps, or torch cannot translate an
            operator of the model. An existing file at `path` is kept.
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
        expected = [_tensors(model(*each)) for each in runs]  # before export, for clearer errors if x is invalid
        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
    size = sum(each.nbytes for each in program.state_dict.values())
    if size > LARGEST:
        raise ValueError(f"model: expected at most {LARGEST / 2**30:.1f} GiB of weights, got {size / 2**30:.1f} GiB")
    program = _replaced(program, REFERENCES | ONNX_REFERENCES)
    names = ["out"] if len(expected[0]) == 1 else [f"out_{i}" for i in range(len(expected[0]))]
    onnx = torch.onnx.export(
        program, dynamo=True, output_names=names, dynamic_shapes=dynamic_shapes, opset_version=opset, verbose=False
    )
    if opset not in (None, onnx.model.opset_imports[""]):  # torch only logs that it uses a different version
        raise ValueError(f"opset: expected a version that torch can write, such as {onnx.model.opset_imports['']}, got {opset}")

    def write(file: Path) -> None:
        onnx.save(file)
        if find_spec("onnxruntime") is not None:
            errors.extend(_compared(file, runs, expected))

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
    """Return `args` and their dynamic_shapes. A single sample is repeated, because torch.export treats size 1 as a constant."""
    shapes = [tuple(each.shape) for each in args if isinstance(each, Tensor)]
    if len({shape[:1] for shape in shapes}) > 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(f"x: expected the same batch size >= 1 for every tensor, or dynamic_shapes, got shapes {shapes}")
    if shapes[0][0] == 1:
        args = tuple(torch.cat([each, each]) if isinstance(each, Tensor) else each for each in args)
    return args, tuple({0: Dim("batch")} if isinstance(each, Tensor) else None for each in args)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compared(file: Path, runs: list[tuple[Any, ...]], expected: list[list[Tensor]]) -> Iterator[float]:
    """Run `file` in onnxruntime and yield the relative error of every output of every run.

    Raises:
        RuntimeError: a relative error exceeds the square root of the output dtype's eps, or an integer output differs.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for args, outputs in zip(runs, expected, strict=True):
        results = session.run(None, dict(zip(names, (each.numpy() for each in _tensors(args)), strict=True)))
        for i, (out, result) in enumerate(zip(outputs, map(torch.from_numpy, results), strict=True)):
            exact = out.double()
            error = ((result.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
            bound = torch.finfo(out.dtype).eps ** 0.5 if out.is_floating_point() else 0.0
            if not error <= bound:  # also true for NaN
                raise RuntimeError(
                    f"output {i}: expected a relative error of at most {bound:.1e}, got {error:.1e} from "
                    f"onnxruntime, for arguments of shapes {[tuple(each.shape) for each in _tensors(args)]}"
                )
            yield error


def _replaced(program: ExportedProgram, references: dict[Callable, Callable]) -> ExportedProgram:
    program = program.run_decompositions(dict(references))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    remaining = {
        str(node.target) for graph in graphs for node in graph.nodes if getattr(node.target, "namespace", "") == "vix_kernels"
    }
    if remaining:
        raise ValueError(
            "program: expected a program for inference, exported with strict=False, got one with the operators "
            f"{', '.join(sorted(remaining))}"
        )
    return program


# Replacements that take the same arguments as the operators. Like the functions in _torch/, they cast 16-bit inputs to float32.


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def _unused(like: Tensor, count: int) -> list[Tensor]:
    """Return `count` empty tensors in place of outputs that only a backward pass reads."""
    return [like.new_empty(0) for _ in range(count)]


def _aggregate(slots, k, v, mask, cos, sin, interleaved, scale, gaussian, backend):
    rotation = dict(rotary=joined(cos, sin, interleaved))
    values, lse = aggregate_reference(slots, _wide(k), _wide(v), scale=scale, gaussian=gaussian, mask=mask, **rotation)
    return values, lse, *_unused(values, 2)


def _broadcast(q, slots, values, slot_bias, cos, sin, interleaved, scale, v, conv_weight, mask, backend):
    options = dict(scale=scale, rotary=joined(cos, sin, interleaved))
    out = broadcast_reference(_wide(q), slots, values, slot_bias, **options)
    if v is not None:
        out = out + _token_conv(_wide(v), conv_weight, mask, backend)
    return out.to(q.dtype), *_unused(values, 2)


def _linear_aggregate(slots, k, v, mask, cos, sin, interleaved, feature_map, backend):
    rotation = dict(rotary=joined(cos, sin, interleaved))
    return linear_aggregate_reference(slots, k, v, feature_map=feature_map, mask=mask, **rotation)


def _linear_broadcast(q, slots, sums, norms, cos, sin, interleaved, feature_map, eps, backend):
    rotation = dict(rotary=joined(cos, sin, interleaved))
    return linear_broadcast_reference(q, slots, sums, norms, feature_map=feature_map, eps=eps, **rotation)


def _landmarks(
    q, k, q_mask, k_mask, cos, sin, interleaved, prefix, rows, mark_rows, mark_columns, adaptive, backend
):  # fmt: skip
    pool = Pool(prefix, rows, mark_rows, mark_columns, adaptive)._asdict()
    options = dict(q_mask=q_mask, k_mask=k_mask, rotary=joined(cos, sin, interleaved)) | pool
    if k is None:
        marks, counts = landmarks_reference(_wide(q), **options)
        return marks.to(q.dtype), q.new_empty(0), counts, counts.new_empty(0)
    q_marks, k_marks, *counts = landmarks_reference(_wide(q), _wide(k), **options)
    return q_marks.to(q.dtype), k_marks.to(k.dtype), *counts


def _pinv(q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init, backend):
    counts = dict(q_counts=q_counts, k_counts=k_counts)
    return pinv_reference(q_marks, k_marks, values, scale=scale, iterations=iterations, init=init, **counts)


def _project(key_projection, value_projection, k, v, mask, cos, sin, interleaved, backend):
    rotation = dict(rotary=joined(cos, sin, interleaved))
    keys, values = project_reference(_wide(k), _wide(v), key_projection, value_projection, mask=mask, **rotation)
    return keys.to(k.dtype), values


def _rotate(q, k, cos, sin, interleaved, inverse, backend):
    return tuple(rotate_reference(x, Rotary(cos, -sin if inverse else sin, interleaved)) for x in (q, k))


def _token_conv(v, weight, mask, backend):
    # In onnxruntime, the windows of token_conv_reference take 15 times as long as a Conv2d.
    x = _wide(v if mask is None else torch.where(mask[:, None, :, None], v, 0.0))
    return F.conv2d(x, weight.to(x.dtype), padding=(weight.shape[2] // 2, 0), groups=v.shape[1]).to(v.dtype)


def _dft(x, ortho, backend, transform=fourier_mixing_reference):
    y = transform(_wide(x))
    # Passing norm="ortho" to the transform would turn the number of tokens into a constant.
    return (y * (x.shape[1] * x.shape[2]) ** -0.5 if ortho else y).to(x.dtype)


def _transform_by_products(x: Tensor) -> Tensor:
    """Return C x C' - S x S' for the input x, computed by matrix products.

    C and C' are the cosine matrices for the tokens and the channels, and S and S' are the corresponding sine matrices.

    At 64 to 1,025 tokens, onnxruntime's DFT operator takes about 2 to 20 times as long as these products. Unless the numbers of
    tokens and channels are powers of two, its results also have about two fewer correct digits.
    """

    def table(size: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(size, device=x.device)
        count = at[-1] + 1  # torch.onnx cannot translate a remainder with the dynamic `size` as divisor
        # The remainder removes full turns in integer arithmetic, which is exact.
        angles = (at[:, None] * at % count).to(x.dtype) * (2 * math.pi) / count
        return angles.cos(), angles.sin()

    (cos, sin), (channel_cos, channel_sin) = (table(size) for size in x.shape[1:])
    return cos @ (x @ channel_cos) - sin @ (x @ channel_sin)


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
