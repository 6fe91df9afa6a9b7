"""Load a state dict either completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, optional: Callable[[str], bool]) -> None:
    """Load `state` into `model`. If `state` does not match the model, raise an error and leave the model unchanged.

    Args:
        what: description of the model, for the error message.
        optional: a function that returns whether the entry with a given name may be missing.

    Raises:
        ValueError: `state` does not match the model. The message lists all entries that are missing or unexpected, or that
            have the wrong shape.
    """
    if found := mismatch(model.state_dict(), state, optional):
        raise ValueError(f"state_dict: does not fit {what}; {found}")
    model.load_state_dict(state, strict=False)


def mismatch(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], optional: Callable[[str], bool], most: int | None = None
) -> str:
    """Return a message that lists missing entries, unexpected entries and wrong shapes in `state`, or "" if there are none.

    Args:
        expected: the state dict of the model.
        optional: a function that returns whether the entry with a given name may be missing.
        most: maximum number of names to list for each problem. None lists all names.
    """
    problems = {
        "missing": [key for key in expected if key not in state and not optional(key)],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} (expected {tuple(expected[key].shape)}, got {tuple(value.shape)})"
            for key, value in state.items()
            if isinstance(value, Tensor) and key in expected and value.shape != expected[key].shape
        ],
    }
    return "; ".join(
        f"{problem}: {', '.join(keys[:most])}{'' if most is None else ', ...' * (len(keys) > most)}"
        for problem, keys in problems.items()
        if keys
    )
