"""Golden outputs of the original Vision Xformers models.

`python -m tests.golden SOURCE` condenses SOURCE/*.json into golden.json.

No weights are stored. The field "rule" in golden.json describes how a seed determines weights, inputs and output gradients.
Each row in "state" contains the shape, base and scale of a state_dict entry and, for a parameter, the norm of its gradient.
A "*" in the key of a row represents the layer numbers 0 to layers - 1. Entries that the constructor of the original model
computes are skipped.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONDENSED = Path(__file__).with_name("golden.json")
COPIED = ("config", "image_size", "seed", "batch", "parameters", "logits", "logits_alone", "tolerance_note")
# The float32 gradient norms of this model have errors of 1e-4, so its float64 norms are used.
NORMS_OF = {"HybridViPRoPE": "grad_norms_float64"}


def condense(source: Path) -> dict[str, Any]:
    """Return the contents of golden.json. `source` is a folder with one uncondensed file per model."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(source.glob("*.json"))}
    (rule,) = {model["rule"] for model in files.values()}
    models = {
        name: {key: model[key] for key in COPIED} | {"state": _rows(model["state"], model[NORMS_OF.get(name, "grad_norms")])}
        for name, model in files.items()
    }
    return {"rule": rule, "models": models}


def _rows(state: dict[str, dict[str, Any]], norms: dict[str, float | None]) -> list[dict[str, Any]]:
    """Return the rows of "state" in golden.json. Entries that differ only in the layer number are merged into one row."""
    alike = defaultdict(list)
    for key, entry in state.items():
        if not entry.get("derived"):
            alike[re.sub(r"^(.*(?:layers|blocks))\.\d+\.", r"\1.*.", key)].append(key)
    rows = []
    for pattern, keys in alike.items():
        equal = all(state[key] == state[keys[0]] for key in keys)
        complete = keys == [pattern.replace("*", str(layer)) for layer in range(len(keys))]
        for key, members in [(pattern, keys)] if equal and complete else [(key, [key]) for key in keys]:
            row = {"key": key, "layers": len(members)} | state[members[0]]
            if members[0] in norms:
                row["norms"] = [None if norms[m] is None else float(f"{norms[m]:.7g}") for m in members]
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Golden:
    """The constructor arguments, weights, inputs and outputs of an original model.

    Attributes:
        config: constructor arguments.
        state: the float32 state_dict without the entries that the constructor computes.
        x: images of shape (batch, 3, image_size, image_size).
        logits: logits of shape (batch, classes).
        alone: logits of the first image when it is the only image in the batch, of shape (1, classes).
        cotangent: gradient of the logits, of shape (batch, classes). The loss is (logits * cotangent).sum().
        norms: norm of the gradient of each parameter, or None if the parameter has no gradient.
        parameters: number of elements in all trainable parameters.
        tolerance: absolute tolerance for logits. It is 20 times the float32 error of the original model, but at least 1e-4
            times the largest absolute logit.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor
    logits: Tensor
    alone: Tensor
    cotangent: Tensor
    norms: dict[str, float | None]
    parameters: int
    tolerance: float


def load(name: str) -> Golden:
    model = json.loads(CONDENSED.read_text())["models"][name]

    def normal(what: str, shape: Iterable[int]) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(f"{model['seed']}:{what}".encode())).standard_normal(tuple(shape))

    state, norms = {}, {}
    for row in model["state"]:
        for layer in range(row["layers"]):
            key = row["key"].replace("*", str(layer))
            weight = row["base"] + row["scale"] * normal(key, row["shape"])
            state[key] = _float(np.abs(weight) if row.get("abs") else weight)
            if "norms" in row:
                norms[key] = row["norms"][layer]
    logits = torch.tensor(model["logits"])
    return Golden(
        config=model["config"],
        state=state,
        x=_float(normal("input", (model["batch"], 3, model["image_size"], model["image_size"]))),
        logits=logits,
        alone=torch.tensor([model["logits_alone"]]),
        cotangent=_float(normal("cotangent", logits.shape)),
        norms=norms,
        parameters=model["parameters"],
        tolerance=max(1e-4 * logits.abs().max().item(), 20 * model["tolerance_note"]),
    )


def _float(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))


if __name__ == "__main__":
    golden = condense(Path(sys.argv[1]))
    models = ",\n".join(f"{json.dumps(name)}: {json.dumps(model)}" for name, model in golden["models"].items())
    CONDENSED.write_text(f'{{"rule": {json.dumps(golden["rule"])},\n"models": {{\n{models}\n}}}}\n')
