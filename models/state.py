"""Loading of weights, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, optional: Callable[[str], bool]) -> None:
    """Load `state` into `model`, which stays as it was if they do not fit.

    Args:
        what: what the state was expected to fit, for the error.
        optional: whether an entry may be missing, by its name.

    Raises:
        ValueError: lists all entries that are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in state and not optional(key)],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} (expected {tuple(expected[key].shape)}, got {tuple(value.shape)})"
            for key, value in state.items()
            if isinstance(value, Tensor) and key in expected and value.shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys)
        raise ValueError(f"state_dict: does not fit {what}; {listed}")
    model.load_state_dict(state, strict=False)
