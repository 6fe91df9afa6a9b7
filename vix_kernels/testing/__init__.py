"""Specifications of operators, for tests and benchmarks.

Each specification contains test cases, a reference implementation and operation counts.

Example:

    from vix_kernels.testing import SPECS
    spec = SPECS["performer_attention"]
    for case in spec.cases:
        problem = spec.problem(case, dtype=torch.bfloat16, device="cuda")
        out = problem(backend="triton")            # a tuple of outputs
        exact = problem.double()(reference=True)   # the outputs of the reference in float64
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .memory import kept_for_backward
from .problem import SPECS, Case, OpSpec, Problem, draw, register

__all__ = ["SPECS", "Case", "OpSpec", "Problem", "draw", "kept_for_backward", "register"]

# Importing a module registers its specifications. Benchmarks run in the order of registration and can run out of time, so the
# modules of the most important operators are imported first.
_FIRST = ("performer", "linear", "rope", "nystrom", "linformer", "agent", "fourier")
for _name in (*_FIRST, *(file.name for file in iter_modules(__path__))):
    import_module(f"{__name__}.{_name}")
