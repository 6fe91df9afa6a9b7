"""A small share of the attacks, the same in every run; `make attack` draws others for as long as it is given."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import vix_kernels
from vix_kernels import primitives
from vix_kernels.backends import triton_installed
from vix_kernels.testing import SPECS

from . import calls, files, numerics


def share(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, print_blob=True,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def test_every_public_op_is_attacked() -> None:
    kinds = ("_attention", "_mixing", "_weights", "apply_rope")
    assert {name for name in vix_kernels.__all__ if name.endswith(kinds)} <= set(numerics.OPS)
    assert {name for name in vix_kernels.nn.__all__ if name.endswith("Attention")} <= set(numerics.OPS)
    assert all(name.startswith(numerics.OPS) or hasattr(primitives, name) for name in SPECS)


@pytest.mark.parametrize("op", numerics.OPS)
@share(25)
@given(data=st.data())
def test_torch(op: str, data: st.DataObject) -> None:
    attack(data.draw(numerics.cases(op)))


@pytest.mark.skipif(not triton_installed() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("op", numerics.OPS)
@share(4)
@given(data=st.data())
def test_triton(op: str, data: st.DataObject) -> None:
    attack(data.draw(numerics.cases(op, "triton")))


def attack(case: numerics.Case) -> None:
    wrong = numerics.check(case)
    assert not wrong, "\n".join([f"{case!r}", *wrong])


TARGETS = calls.targets()


@pytest.mark.parametrize("label", TARGETS)
def test_wrong_calls(label: str) -> None:
    wrong = calls.check(label, TARGETS[label])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_double_backward(backend: str) -> None:
    assert not calls.check_double_backward(backend)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory, which Linux alone keeps")


@LINUX
@pytest.mark.parametrize("reader", [reader for reader in files.READERS if reader not in files.SLOW])
@share(30)
@given(data=st.data())
def test_corrupted_files(reader: str, data: st.DataObject) -> None:
    attack_reader(data.draw(files.damages(reader)))


@LINUX
@pytest.mark.parametrize("reader", files.SLOW)
@share(6)
@given(data=st.data())
def test_corrupted_runs(reader: str, data: st.DataObject) -> None:
    attack_reader(data.draw(files.damages(reader)))


def attack_reader(damage: files.Damage) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = files.check(damage)
    assert not wrong, "\n".join([f"{damage!r}", *wrong])
