"""One specification an operator: its cases, its reference, its costs. Tests, benchmarks and users share them.

from vix_kernels.testing import SPECS
spec = SPECS["performer_attention"]
for case in spec.cases:
    problem = spec.problem(case, dtype=torch.bfloat16, device="cuda")
    out = problem(backend="triton")            # a tuple of outputs
    exact = problem.double()(reference=True)   # the same problem in float64, by the plain reference
"""

from __future__ import annotations

from . import fourier, linear, performer, rope
from .memory import kept_for_backward
from .problem import Case, OpSpec, Problem

__all__ = ["SPECS", "Case", "OpSpec", "Problem", "kept_for_backward"]

SPECS: dict[str, OpSpec] = {spec.name: spec for file in (performer, linear, rope, fourier) for spec in file.SPECS}
