"""Attention transfer: fit linear-cost attention to the softmax attention of a trained model, layer by layer.

While a model runs, a `Transfer` replaces the core (see nn/core.py) of each attention layer. A `Transfer` returns the output of
softmax attention, so every layer receives the same inputs as in the trained model (the teacher). It also compares this output
(softmax_n for token n) with the outputs out_n of one or more linear-cost cores (the students) for the same q, k and v. The
error of a student is

    sum_n w_n |out_n - softmax_n|^2 / sum_n w_n |softmax_n|^2

where n runs over the valid tokens that do not use exact softmax attention. Among these tokens, class and register tokens have a
larger weight w_n. Every layer has a separate loss. Its backward pass runs before the next layer starts, so only one layer at a
time keeps activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.drop_in import DropIn
from ..integrations.swap import prefix_of
from ..nn.core import Core, Mounted, SdpaArgs, Tokens
from ..nn.softmax import Softmax
from ..ops.rope import Rope, apply_rope
from ..training.parallel import Ranks

PREFIX_WEIGHT = 32.0  # weight of class and register tokens without exact softmax attention
SUMS = 2048  # maximum number of sums q_i + k_j per call, or 4 per feature if that is more; see `initialize`
CLUSTER_STEPS = 10
LANDMARKS = (16, 32, 64, 128)  # numbers of landmarks to choose from if max_error is set

SOFTMAX = Softmax()


@dataclass
class Layer:
    """An attention layer to convert.

    Attributes:
        name: the name of the layer in the model.
        holder: the module that holds the core and its parameters.
        students: the candidate cores.
        prefix_tokens: the number of class and register tokens.
        on_grid: number of students whose landmarks or agents can be placed on the model's grid. They come first in `students`.
        tokens, batch: the number of tokens and the batch size of k in the latest call.
        reason: why the layer cannot be converted, or "" if no reason is known.
        errors: for each call, a tensor (students + 1,): the squared error of each student, and the squared norm of the softmax
            attention's output. Both are weighted sums over the tokens.
        sums: for each call, a tensor of sums q_i + k_j for random tokens i and j, which initialize the features.
        scale: the scale of the logits.
    """

    name: str
    holder: Mounted
    students: list[Core]
    prefix_tokens: int
    on_grid: int = 1
    tokens: int = 0
    batch: int = 0
    reason: str = ""
    errors: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    scale: float = 1.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.holder.learned_parameters()

    def relative_errors(self, ranks: Ranks) -> list[float]:
        """Return the relative squared error of each student over all measured batches, and clear `errors`."""
        *squares, total = ranks.sum(torch.stack(self.errors).sum(0).cpu()).tolist()
        self.errors = []
        return [square / total if total else 0.0 for square in squares]


def layer_of(name: str, holder: Mounted, op: str, options: dict[str, Any], several: bool) -> Layer:
    """Return a layer with its candidate cores.

    For "nystrom", the candidates differ in the placement of the landmarks (on the token grid or in segments of the sequence)
    and, if `several` is set, in the number of landmarks. Options that the user specified are the same in all candidates.
    """
    core = holder.core
    if op != "nystrom":
        return Layer(name, holder, [core], prefix_of(holder))
    counts = LANDMARKS if several and "num_landmarks" not in options else (core.num_landmarks,)
    students = [replace(core, num_landmarks=count) for count in counts]
    on_grid = core.grid_size is not None or (isinstance(holder, DropIn) and holder.grid is not None)
    segments = []
    if on_grid and "landmarks" not in options and "grid_size" not in options:
        segments = [replace(student, landmarks="segment", grid_size=None) for student in students]
    if core.grid_size is not None:
        students = [student.on_grid(core.grid_size) for student in students]
    return Layer(name, holder, students + segments, prefix_of(holder), len(students))


@dataclass(frozen=True)
class Call:
    """The arguments of one call to `Core.attend`."""

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    rope: Rope | None
    tokens: Tokens
    backend: str

    def attend(self, core: Core) -> Tensor:
        module = core.derived(self.q) if self.module is None else self.module
        return core.attend(
            module, self.q, self.k, self.v, scale=self.scale, rope=self.rope, tokens=self.tokens, sdpa=SdpaArgs(),
            backend=self.backend,
        )  # fmt: skip


# Called with a layer, its students (with landmarks placed for this call), the call, and the output of softmax attention
Action = Callable[[Layer, list[Core], Call, Tensor], None]


class Transfer(Core):
    """A core that computes softmax attention, and passes each call and its output to `action`."""

    name = "transfer"

    def __init__(self, layer: Layer, action: Action, students: list[Core] | None = None) -> None:
        self.layer, self.action, self.students = layer, action, students or layer.students
        self.prefix_tokens, self.grid_size = layer.students[0].prefix_tokens, None

    def accepts(self) -> frozenset[str]:
        return SOFTMAX.accepts()

    def on_grid(self, size: tuple[int, int]) -> Transfer:
        number = self.layer.on_grid
        placed = [student.on_grid(size) for student in self.students[:number]]
        return Transfer(self.layer, self.action, placed + self.students[number:])

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        target = SOFTMAX.attend(module, q, k, v, scale=scale, rope=rope, tokens=tokens, sdpa=sdpa, backend=backend)
        self.layer.batch, self.layer.tokens = k.shape[0], k.shape[2]
        if sdpa.attn_mask is not None:
            self.layer.reason = "it adds a mask or a bias to its logits"
        elif not self.layer.reason:
            call = Call(module, q.detach(), k.detach(), v.detach(), scale, rope, tokens, backend)
            try:
                self.action(self.layer, self.students, call, target.detach())
            except NotImplementedError as error:  # for example, if a student does not support rotary embeddings
                self.layer.reason = str(error)
        return target


def ignore(layer: Layer, students: list[Core], call: Call, target: Tensor) -> None:
    """Do nothing, so that the model only computes softmax attention."""


def squared(layer: Layer, student: Core, call: Call, out: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted squared error of `out` and the weighted squared norm of `target`."""
    exact, prefix = student.exact_rows(call.tokens), layer.prefix_tokens
    weights = torch.ones(out.shape[2], device=out.device)
    weights[:prefix] = PREFIX_WEIGHT
    weights[:exact] = 0
    weights = weights[:, None]
    if call.tokens.key_padding_mask is not None and call.tokens.self_attention:
        weights = weights * call.tokens.key_padding_mask[:, None, :, None]
    out, target = out.float(), target.float()
    return (weights * (out - target).square()).sum(), (weights * target.square()).sum()


@torch.no_grad()
def measure(layer: Layer, students: list[Core], call: Call, target: Tensor) -> None:
    """Append a tensor to `layer.errors`: the squared errors of all students, followed by the squared norm of `target`."""
    found = [squared(layer, student, call, call.attend(student), target) for student in students]
    sums = torch.stack([square for square, _ in found] + [found[0][1]]).double()
    layer.errors.append(sums)


def collect(layer: Layer, students: list[Core], call: Call, target: Tensor) -> None:
    """Append sums q_i + k_j to `layer.sums`, where i and j are random tokens of the same sample."""
    q, k = call.q, call.k
    if call.rope is not None:
        q, k = apply_rope(q, k, call.rope, backend=call.backend)
    layer.scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    seed = len(layer.sums)
    generator = torch.Generator().manual_seed(seed)
    wanted = max(SUMS, 4 * layer.parameters[0].shape[-2])
    count = min(wanted, 32 * len(q))  # at most 32 pairs per sample
    samples = torch.arange(count) % len(q)
    rows, columns = (torch.randint(x.shape[2], (count,), generator=generator) for x in (q, k))
    if call.tokens.key_padding_mask is not None:
        mask = call.tokens.key_padding_mask.cpu()
        some = mask.any(-1).nonzero().squeeze(-1)  # samples with valid tokens
        if not len(some):
            return
        samples = some[samples % len(some)]
        lengths, valid = mask.sum(-1)[samples], mask.int().argsort(dim=-1, descending=True, stable=True)  # valid tokens first
        columns = valid[samples, columns % lengths]
        if call.tokens.self_attention:
            rows = valid[samples, rows % lengths]
    samples, rows, columns = (x.to(q.device) for x in (samples, rows, columns))
    layer.sums.append((q[samples, :, rows] + k[samples, :, columns]).float())  # (count, heads, head_dim)


def fitting(ranks: Ranks) -> Action:
    """Return an action that adds the gradient of a layer's error to the gradients of the layer's parameters."""

    def fit(layer: Layer, students: list[Core], call: Call, target: Tensor) -> None:
        with torch.enable_grad():
            square, total = squared(layer, students[0], call, call.attend(students[0]), target)
            (square / ranks.sum(total).clamp(min=1e-30)).backward()

    return fit


@torch.no_grad()
def initialize(layer: Layer, seed: int) -> None:
    """Set the weights w of the features to k-means centers of q' + k', where q' = sqrt(scale) q and k' = sqrt(scale) k.

    exp(scale q.k) = exp(|q' + k'|^2 / 2) exp(-|q'|^2 / 2) exp(-|k'|^2 / 2). The features exp(w.q') exp(w.k' - |w|^2 / 2) with w
    near q' + k' contribute most to an estimate of the first factor.
    """
    if not layer.sums:
        raise ValueError(f"batches: expected valid tokens for {layer.name}, got a mask that excludes all")
    points = torch.cat(layer.sums).movedim(1, 0) * math.sqrt(layer.scale)  # (heads, sums, head_dim)
    layer.sums = []
    wq, wk, bias = layer.holder.query_features, layer.holder.key_features, layer.holder.feature_bias
    centers = cluster(points, wq.shape[-2], seed)
    wq.copy_(centers)
    wk.copy_(centers)
    bias.copy_(-centers.square().sum(-1) / 2)


def cluster(points: Tensor, count: int, seed: int) -> Tensor:
    """Return the centers (heads, count, dim) of k-means clusters of `points` (heads, n, dim)."""
    heads, n, dim = points.shape
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(n, generator=generator)[torch.arange(count) % n] for _ in range(heads)])
    centers = points.gather(1, first.to(points.device)[..., None].expand(-1, -1, dim))
    for _ in range(CLUSTER_STEPS):
        nearest = torch.cdist(points, centers).argmin(-1)
        # A matrix product with one-hot rows adds in a fixed order, which scatter_add does not guarantee.
        member = nn.functional.one_hot(nearest, count).to(points.dtype)
        sizes = member.sum(1)[..., None]
        centers = torch.where(sizes > 0, (member.mT @ points) / sizes.clamp(min=1), centers)
    return centers


def transferring(layers: list[Layer], action: Action) -> None:
    """Replace the core of each layer with a `Transfer` that calls `action`."""
    for layer in layers:
        layer.holder.core = Transfer(layer, action)


@contextmanager
def softmax(layers: list[Layer]) -> Iterator[None]:
    """Make all converted layers compute softmax attention inside the `with` block."""
    cores = [layer.holder.core for layer in layers]
    transferring(layers, ignore)
    try:
        yield
    finally:
        for layer, core in zip(layers, cores, strict=True):
            layer.holder.core = core
