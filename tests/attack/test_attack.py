"""A small fixed sample of random cases. `make attack` tests new random cases for a given time."""

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


def sample(examples: int) -> settings:
    # With derandomize=True, the name and body of a test determine its cases.
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
@sample(25)
@given(data=st.data())
def test_torch(op: str, data: st.DataObject) -> None:
    attack(data.draw(numerics.cases(op)))


@pytest.mark.skipif(not triton_installed() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("op", numerics.OPS)
@sample(4)
@given(data=st.data())
def test_triton(op: str, data: st.DataObject) -> None:
    attack(data.draw(numerics.cases(op, "triton")))


def attack(case: numerics.Case) -> None:
    violations = numerics.check(case)
    assert not violations, "\n".join([f"{case!r}", *violations])


TARGETS = calls.targets()


@pytest.mark.parametrize("label", TARGETS)
def test_wrong_calls_raise_named_errors(label: str) -> None:
    violations = calls.check(label, TARGETS[label])
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_double_backward_raises_except_in_the_reference(backend: str) -> None:
    assert not calls.check_double_backward(backend)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced only on Linux")


@LINUX
@pytest.mark.parametrize("reader", [reader for reader in files.READERS if reader not in files.SLOW])
@sample(30)
@given(data=st.data())
def test_corrupted_files(reader: str, data: st.DataObject) -> None:
    attack_reader(data.draw(files.damages(reader)))


@LINUX
@pytest.mark.parametrize("reader", files.SLOW)
@sample(6)
@given(data=st.data())
def test_corrupted_runs(reader: str, data: st.DataObject) -> None:
    attack_reader(data.draw(files.damages(reader)))


def attack_reader(damage: files.Damage) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        violations = files.check(damage)
    assert not violations, "\n".join([f"{damage!r}", *violations])
