"""Load a state dict either completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, optional: Callable[[str], bool]) -> None:
    """Load `state` into `model`. If it does not fit, raise an error and leave the model unchanged.

    Args:
        what: description of the model, for the error message.
        optional: a function that returns whether the entry with a given name may be missing.

    Raises:
        ValueError: the state does not fit. The message lists all entries that are missing or unexpected, or that have the
            wrong shape.
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
