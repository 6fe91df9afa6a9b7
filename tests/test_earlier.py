"""Test that the current code loads the model and the run in tests/earlier, and reproduces the recorded results.

The files in tests/earlier were written at commit 5d75bb5.
"""

from __future__ import annotations

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from earlier.write import COMPARED, describe, fill, normal, subjects

from vix_kernels.__main__ import main
from vix_kernels.models import create_model, load_model
from vix_kernels.testing.models import small_model
from vix_kernels.training.data import load_dataset
from vix_kernels.training.trained import evaluate_trained, load_trained

FOLDER = Path(__file__).with_name("earlier")
STATES = json.loads((FOLDER / "states.json").read_text())
SUBJECTS = dict(subjects())
HOSTS = ("timm", "transformers", "diffusers")


@pytest.mark.parametrize("name", STATES)
def test_state_dicts_and_outputs_are_unchanged(name: str) -> None:
    host = name.partition(" ")[0]
    if host in HOSTS and not find_spec(host):
        pytest.skip(f"{host} is not installed")
    expected, found = STATES[name], describe(SUBJECTS[name])
    assert list(found["parameters"].items()) == list(expected["parameters"].items())
    assert found["others"] == expected["others"]
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)
    assert found["outputs"] == pytest.approx(expected["outputs"], rel=1e-3, abs=1e-4 * expected["norm"])


def test_an_earlier_saved_model_loads() -> None:
    expected = create_model("hybrid_vin", **small_model("hybrid_vin")).eval()
    fill(expected)
    x = normal(2, 3, 8, 8)
    assert torch.equal(load_model(FOLDER / "model")(x), expected(x))


def test_an_earlier_run_is_evaluated() -> None:
    with open(FOLDER / "run" / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    evaluation = evaluate_trained(load_trained(FOLDER / "run", torch.device("cpu")), load_dataset("digits"))
    assert evaluation.top1 == pytest.approx(float(row["eval_top1"]), abs=0.6)  # two of 360 images may differ
    assert evaluation.loss == pytest.approx(float(row["eval_loss"]), rel=1e-3)


def test_an_earlier_run_is_resumed(tmp_path: Path) -> None:
    run = shutil.copytree(FOLDER / "run", tmp_path / "run")
    assert main(["train", "--resume", str(run), "--time-to", "100"]) == 0
    with open(run / "summary.csv") as file:
        last = list(csv.DictReader(file))[-1]
    expected = json.loads((FOLDER / "resumed.json").read_text())
    assert last["epoch"] == "2"
    for name in COMPARED:
        assert float(last[name]) == pytest.approx(expected[name], rel=1e-3, abs=0.6 if name == "eval_top1" else 0)
