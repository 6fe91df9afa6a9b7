"""Tests of the rules in CONTRIBUTING.md for imports, docstrings, and the size of files and functions."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import vix_kernels
from vix_kernels import conditions, primitives

ROOT = Path(__file__).parents[1]

# The layers from top to bottom. A module may import only from the same row and from the rows below.
LAYERS = (
    ("__main__",),
    ("linearize",),
    ("training",),
    ("integrations",),
    ("measure",),
    ("export", "testing"),
    ("models",),
    ("nn",),
    ("ops",),
    ("plans",),
    ("recorder",),
    ("replay",),
    ("primitives",),
    ("_torch",),
    ("_triton",),
    ("backends", "commands", "conditions", "layout"),
)
RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}

UPWARDS: set[tuple[str, str]] = set()  # must stay empty
LONG: dict[str, int] = {}
MANY_ARGUMENTS = {"ops.nystrom.nystrom_attention"}  # a public function with one argument per option


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the name of each module, without "vix_kernels.", and its path."""
    for folder, prefix in ((ROOT / "vix_kernels", ()), (ROOT / "models", ("models",))):
        for path in sorted(folder.rglob("*.py")):
            parts = *prefix, *path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield the absolute names of all imports in a file."""
    package = ["vix_kernels", *name.split(".")] if name else ["vix_kernels"]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            for each in node.names:  # an imported name may be a module
                full = ".".join([*base, each.name])
                yield full if full.removeprefix("vix_kernels.") in MODULES else ".".join(base)


def layer(name: str) -> str:
    return name.partition(".")[0]


def test_imports_point_downwards() -> None:
    found = set()
    for name, path in MODULES.items():
        if not name:  # the package itself re-exports public names
            continue
        for target in imported(name, path):
            to = layer(target.removeprefix("vix_kernels."))
            if target.startswith("vix_kernels.") and RANK[to] > RANK[layer(name)]:
                found.add((name, to))
    assert found == UPWARDS


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in MODULES if name} == set(RANK)


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) in ("_torch", "_triton")])
def test_implementations_do_not_import_each_other(name: str) -> None:
    other = {"_torch": "vix_kernels._triton", "_triton": "vix_kernels._torch"}[layer(name)]
    assert not any(target.startswith(other) for target in imported(name, MODULES[name]))


def test_only_kernels_and_measurements_import_triton() -> None:
    importers = {name for name, path in MODULES.items() for target in imported(name, path) if layer(target) == "triton"}
    assert {layer(name) for name in importers} == {"_triton", "measure"}


def test_every_primitive_has_a_torch_implementation() -> None:
    """Every primitive except `nystrom` has a module in _torch/ whose name starts with the primitive's name.

    `nystrom` combines other primitives.
    """
    primitives = {name.partition(".")[2] for name in MODULES if layer(name) == "primitives"} - {"", "autograd", "registry"}
    files = {name.partition(".")[2] for name in MODULES if layer(name) == "_torch"}
    assert {name for name in primitives if not any(file.startswith(name) for file in files)} == {"nystrom"}


SHAPE = re.compile(r"\((batch|heads|num_heads|M|1|2|samples)\b[^)]*,")
SOURCE = re.compile(r"arXiv|et al\.")


@pytest.mark.parametrize("name", [name for name in vix_kernels.__all__ if inspect.isfunction(getattr(vix_kernels, name))])
def test_public_functions_document_their_contract(name: str) -> None:
    """The docstring documents every argument, the shapes, the result and errors.

    The docstring of the function or of the module cites a source.
    """
    function = getattr(vix_kernels, name)
    text = inspect.getdoc(function)
    arguments, returns, errors = (text.find(f"\n{title}:\n") for title in ("Args", "Returns", "Raises"))
    assert 0 < arguments < returns < errors
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", text[arguments:returns]), argument
    assert SHAPE.search(text) and re.search(r"\w+Error", text[errors:])
    assert SOURCE.search(text + inspect.getmodule(function).__doc__)


@pytest.mark.parametrize("name", primitives.__all__)
def test_primitives_document_their_contract(name: str) -> None:
    """The docstring documents every argument, the shapes and the result. The module docstring contains the equation.

    Errors are not documented, because primitives do not check their arguments.
    """
    function = getattr(primitives, name)
    text = inspect.getdoc(function)
    arguments, returns = text.find("\nArgs:\n"), text.find("\nReturns:\n")
    assert 0 < arguments < returns and SHAPE.search(text)
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", text[arguments:returns]), argument
    assert " = " in inspect.getmodule(function).__doc__


def test_files_are_short() -> None:
    """Files have at most 400 lines, except those in LONG."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: count for name, count in lines.items() if count > 400} == LONG


def test_functions_above_the_kernels_take_few_arguments() -> None:
    """At most 13 arguments are allowed, including `ctx` and `backend`. Kernels are exempt, because they cannot take objects."""
    found = set()
    for name, path in MODULES.items():
        if layer(name) in ("ops", "primitives", "_torch", "_triton"):
            functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
            for function in functions:
                arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
                if len(arguments) > 13 and not any("jit" in ast.unparse(each) for each in function.decorator_list):
                    found.add(f"{name}.{function.name}")
    assert found == MANY_ARGUMENTS


def test_a_call_goes_through_few_files() -> None:
    """docs/kernels.md lists these files. A kernel launch is six function calls deep, or seven with gradients."""
    pytest.importorskip("triton", reason="kernels are launched with Triton, which is not installed here")
    package = str(ROOT / "vix_kernels")
    files, depths = set(), {}

    def called(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            files.add(str(Path(frame.f_code.co_filename).relative_to(package)))

    def launched(kernel: Any, *rest: object) -> None:
        frames = traceback.extract_stack()
        depths[kernel.__name__] = sum(frame.filename.startswith(package) for frame in frames)

    q, k, v = torch.randn(3, 1, 2, 80, 16).unbind()
    projection = vix_kernels.orthogonal_projection(8, 16, seed=0)
    with conditions.under(observer=launched):
        vix_kernels.performer_attention(q, k, v, projection, backend="triton")  # also runs lazy imports
        assert depths == dict.fromkeys(("aggregate_forward_kernel", "merge_softmax_kernel", "broadcast_forward_kernel"), 6)
        k.requires_grad_()
        sys.setprofile(called)
        try:
            vix_kernels.performer_attention(q, k, v, projection, backend="triton")
        finally:
            sys.setprofile(None)
    page = (ROOT / "docs" / "kernels.md").read_text()
    listed = page.partition("goes through these files")[2].split("```")[1].splitlines()[1:]
    assert files == {line.split()[0] for line in listed} and len(files) <= 11
    assert set(depths.values()) == {7}
