"""Test that the example files in docs/kernels.md and one import line suffice to add an attention operator to the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from snippets import parse

pytest.importorskip("triton", reason="the files are compiled and measured with Triton, which is not installed here")

ROOT = Path(__file__).resolve().parents[1]
FILES = ("vix_kernels/ops/efficient.py", "vix_kernels/testing/efficient.py", "vix_kernels/nn/efficient.py")
SMALL = ["--op", "efficient_attention"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package, add the three files from docs/kernels.md and the export of the new function, and return the folder."""
    folder = tmp_path_factory.mktemp("overlay")
    ignore = shutil.ignore_patterns("__pycache__", "models")
    shutil.copytree(ROOT / "vix_kernels", folder / "vix_kernels", ignore=ignore)
    shutil.copytree(ROOT / "models", folder / "vix_kernels" / "models", ignore=ignore)
    written = {block.title: block.text for block in parse(ROOT / "docs" / "kernels.md") if block.title}
    for name in FILES:
        (folder / name).write_text(written[name])
    exports = folder / "vix_kernels" / "__init__.py"
    exports.write_text(exports.read_text() + "from .ops.efficient import efficient_attention\n")
    return folder


def run(tree: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "tests")])} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_models_and_torch_nn_use_the_new_attention(tree: Path) -> None:
    run(tree, "-c", """
import torch, vix_kernels
from vix_kernels.models import create_model
assert vix_kernels.efficient_attention.__module__ == "vix_kernels.ops.efficient"
sizes = dict(img_size=8, patch_size=2, embed_dim=16, num_heads=2, depth=2)
assert create_model("vit", mixer="efficient", **sizes)(torch.randn(2, 3, 8, 8)).shape == (2, 10)

from torch import nn
from vix_kernels.integrations.torch_nn import replace_mha
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
assert len(replace_mha(encoder, "efficient", retrain=True).replaced) == 2
encoder(torch.randn(1, 6, 32)).sum().backward()
""")  # fmt: skip


@pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed")
def test_timm_uses_the_new_attention(tree: Path) -> None:
    run(tree, "-c", """
import torchvision_operators
kept = torchvision_operators.declare()
import timm, torch
from vix_kernels.integrations.timm import replace_attention
vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2)
assert len(replace_attention(vit, "efficient", retrain=True).replaced) == 2
vit(torch.randn(1, 3, 32, 32)).sum().backward()
""")  # fmt: skip


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_transformers_uses_the_new_attention(tree: Path) -> None:
    run(tree, "-c", """
import torchvision_operators
kept = torchvision_operators.declare()
import torch, transformers
from vix_kernels.integrations.transformers import register
register(retrain=True)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
model = transformers.ViTModel(transformers.ViTConfig(**sizes))
model.set_attn_implementation("vix_efficient")
model(torch.randn(1, 3, 32, 32)).last_hidden_state.sum().backward()
""")  # fmt: skip


def test_the_command_line_measures_the_new_attention(tree: Path) -> None:
    """Benchmark the new operator and SDPA. Then compile the new operator for a GPU, and measure its memory traffic."""
    vix = "-m", "vix_kernels"
    sizes = ["--values", "64", "--batch", "1", "--heads", "2", "--width", "16", "--rounds", "1"]
    table = run(tree, *vix, "bench", *SMALL, *sizes, "--provider", "torch", "reference", "sdpa")
    rows = {tuple(line.split()[:4]) for line in table.splitlines()}
    assert {("efficient_attention", "64", "full", name) for name in ("torch", "reference", "sdpa")} <= rows, table
    assert "efficient_attention" in run(tree, *vix, "check")
    report = run(
        tree, *vix, "dev", "compile-report", *SMALL, "--arch", "sm_90", "--dtype", "bf16", "--width", "64",
        TRITON_INTERPRET="0",
    )  # fmt: skip
    assert "efficient forward" in report and "broadcast_forward_kernel" in report
    sizes = ["--batch", "1", "--heads", "1", "--tokens", "64"]
    assert "efficient_attention backward" in run(tree, *vix, "dev", "traffic", *SMALL, *sizes)


def test_another_package_can_register_the_attention(tree: Path, tmp_path: Path) -> None:
    """The three files also work outside the package."""
    for name in FILES:
        text = (tree / name).read_text()
        folder = Path(name).parts[1]
        for package in ("ops", "plans", "primitives", "nn", "testing"):
            text = text.replace(f"from ..{package}.efficient ", "from .efficient_ops ").replace(
                f"from ..{package}", f"from vix_kernels.{package}"
            )
        text = text.replace("from .. import", "from vix_kernels import").replace("from .checks", "from vix_kernels.ops.checks")
        text = text.replace("from .core", "from vix_kernels.nn.core").replace(
            "from .problem", "from vix_kernels.testing.problem"
        )
        (tmp_path / "extension").mkdir(exist_ok=True)
        (tmp_path / "extension" / f"efficient_{folder}.py").write_text(text)
    (tmp_path / "extension" / "__init__.py").write_text("from . import efficient_nn, efficient_testing\n")
    vix = "-m", "vix_kernels", "--import", "extension"
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    arguments = "--epochs 1 --warmup-epochs 0 --output run --model-kwargs mixer=efficient depth=1 embed_dim=16 num_heads=2"
    run(tmp_path, *vix, "train", "--model", "vit", *arguments.split(), PYTHONPATH=path)
    report = run(
        tmp_path, *vix, "dev", "compile-report", *SMALL, "--arch", "sm_90", "--dtype", "bf16", "--width", "32",
        PYTHONPATH=path, TRITON_INTERPRET="0",
    )  # fmt: skip
    assert "efficient forward" in report
