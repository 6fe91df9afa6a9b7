"""One specification an operator: its cases, its reference, its costs. Tests, benchmarks and users share them.

from vix_kernels.testing import SPECS
spec = SPECS["performer_attention"]
for case in spec.cases:
    problem = spec.problem(case, dtype=torch.bfloat16, device="cuda")
    out = problem(backend="triton")            # a tuple of outputs
    exact = problem.double()(reference=True)   # the same problem in float64, by the plain reference
"""

from __future__ import annotations

from . import agent, conv, fourier, landmarks, linear, linformer, nystrom, performer, pinv, rope
from .memory import kept_for_backward
from .problem import Case, OpSpec, Problem, draw

__all__ = ["SPECS", "Case", "OpSpec", "Problem", "draw", "kept_for_backward"]

_FILES = (performer, linear, rope, nystrom, linformer, agent, fourier, conv, landmarks, pinv)
SPECS: dict[str, OpSpec] = {spec.name: spec for file in _FILES for spec in file.SPECS}
