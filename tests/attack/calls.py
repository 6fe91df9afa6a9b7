"""Invalid calls generated from signatures. Each call passes one invalid argument.

The annotation and the name of a parameter determine the invalid values. Each call must raise one of the errors in `NAMED`,
with a message that names the argument. Parameters of type bool are exempt, because every Python value has a truth value.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vix_kernels
from vix_kernels import models

NAMED = (TypeError, ValueError, NotImplementedError, RuntimeError)
BATCH, HEADS, TOKENS, WIDTH = 2, 2, 8, 16
COUNTS = re.compile(r"num_\w+|dim|tokens|height|width|seq_len|head_dim")  # parameters that must be at least 1
POSITIVE = ("scale", "base")


@dataclass(frozen=True)
class Target:
    """A function and valid arguments for it.

    Attributes:
        function: the function to call.
        arguments: valid arguments, by name.
        parameters: annotations of the parameters, by name, if the signature of `function` has none.
        skipped: names of parameters that have no invalid values or are checked elsewhere.
        fixed: for each tensor name, the dimensions whose size is determined by a different argument.
        also: additional error types that the documentation of `function` lists.
        refused: whether `function` rejects even `arguments`, for example because a file is missing. If so, only calls with
            invalid values are checked.
    """

    function: Callable
    arguments: dict[str, Any]
    parameters: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    fixed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    also: tuple[type[Exception], ...] = ()
    refused: bool = False


def annotations(function: Callable) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: str(each.annotation) for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def targets() -> dict[str, Target]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(BATCH, HEADS, TOKENS, WIDTH) for _ in range(3))
    qkv, fixed = dict(q=q, k=k, v=v), dict(q=(0, 1, 3), k=(0, 1, 2, 3), v=(0, 1, 2))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    rope = vix_kernels.rope_1d(TOKENS, WIDTH)
    common = qkv | dict(key_padding_mask=mask, rope=rope, backend="torch", scale=0.25, exact_rows=1)
    unscaled = {name: value for name, value in common.items() if name not in ("scale", "exact_rows")}
    projection = vix_kernels.orthogonal_projection(12, WIDTH, seed=0)
    frequencies = vix_kernels.rope_mixed_frequencies(WIDTH, HEADS, seed=0)
    fixed_mask = fixed | dict(key_padding_mask=(0, 1))
    found = {
        "performer_attention": Target(
            vix_kernels.performer_attention, common | dict(projection=projection), fixed=fixed_mask | dict(projection=(1,))
        ),
        "feature_attention": Target(
            vix_kernels.feature_attention,
            common
            | dict(query_features=projection, key_features=projection.flip(0), feature_bias=torch.zeros(12), gaussian=0.5),
            fixed=fixed_mask | dict(query_features=(0, 1), key_features=(0, 1), feature_bias=(0,)),
        ),
        "linear_attention": Target(
            vix_kernels.linear_attention,
            unscaled | dict(projection=projection, feature_map="elu", eps=0.5),
            fixed=fixed_mask | dict(projection=(1,)),
        ),
        "nystrom_attention": Target(
            vix_kernels.nystrom_attention,
            common
            | dict(
                num_landmarks=4,
                landmarks="grid",
                grid_size=(2, 4),
                prefix_tokens=0,
                pinv_iterations=6,
                pinv_init="exact",
                conv_weight=normal(HEADS, 1, 3, 1),
            ),
            fixed=fixed_mask | dict(q=(0, 1, 2, 3), conv_weight=(0, 1, 3)),
        ),
        "linformer_attention": Target(
            vix_kernels.linformer_attention,
            common | dict(key_projection=normal(TOKENS, 5), value_projection=normal(TOKENS, 5)),
            fixed=fixed_mask | dict(key_projection=(1,), value_projection=(1,)),
        ),
        "agent_attention": Target(
            vix_kernels.agent_attention,
            common | dict(agents=normal(BATCH, HEADS, 5, WIDTH), agent_mask=torch.ones(BATCH, 5, dtype=torch.bool)),
            fixed=fixed_mask | dict(agents=(0, 1, 3), agent_mask=(0, 1)),
        ),
        "fourier_mixing": Target(
            vix_kernels.fourier_mixing, dict(x=normal(BATCH, TOKENS, WIDTH), norm="ortho", backend="torch")
        ),
        "apply_rope": Target(
            vix_kernels.apply_rope, dict(q=q, k=k, rope=rope, backend="torch"), fixed=dict(q=(0, 1, 2, 3), k=(0, 1, 2, 3))
        ),
        "attention_weights": Target(
            vix_kernels.attention_weights,
            dict(attention=vix_kernels.performer_attention, q=q, k=k, projection=projection, token=-1),
            fixed=dict(q=(0, 1, 3), k=(0, 1, 3)),
        ),
        "rope_1d": Target(
            vix_kernels.rope_1d,
            dict(tokens=8, dim=16, base=10.0, layout="half", prefix_tokens=1),
            skipped=("device",),
        ),
        "rope_axial": Target(
            vix_kernels.rope_axial,
            dict(height=2, width=4, dim=16, base=10.0, layout="half", prefix_tokens=1),
            skipped=("device",),
        ),
        "rope_mixed": Target(
            vix_kernels.rope_mixed, dict(height=2, width=4, frequencies=frequencies, layout="half", prefix_tokens=1)
        ),
        "rope_mixed_frequencies": Target(vix_kernels.rope_mixed_frequencies, dict(dim=16, num_heads=2, seed=0, base=10.0)),
        "Rope": Target(
            vix_kernels.Rope,
            dict(cos=rope.cos, sin=rope.sin, layout="half", angles=rope.cos),
            fixed=dict(cos=(0, 1, 2), sin=(0, 1, 2), angles=(0, 1, 2)),
        ),
        "Rope.of": Target(vix_kernels.Rope.of, dict(angles=rope.cos, layout="half")),
        "orthogonal_projection": Target(
            vix_kernels.orthogonal_projection, dict(num_features=12, head_dim=16, seed=0, num_heads=2, scaling="chi")
        ),
        "create_model": Target(models.create_model, dict(name="vip_tiny")),
        "list_models": Target(models.list_models, dict(pattern="vi*")),
        "load_model": Target(models.load_model, dict(folder="nope"), also=(FileNotFoundError,), refused=True),
        "save_model": Target(models.save_model, dict(model=nn.Linear(1, 1), folder="/dev/null/nope"), refused=True),
        "from_original": Target(models.from_original, dict(name="ViP", config={}, state_dict={}), refused=True),
    }
    return found | module_targets(normal, mask, rope) | integration_targets()


def module_targets(normal: Callable[..., Tensor], mask: Tensor, rope: Any) -> dict[str, Target]:
    options = {
        "Attention": {},
        "PerformerAttention": dict(num_features=12, seed=0),
        "FeatureAttention": dict(num_features=12, gaussian=0.5, seed=0),
        "LinearAttention": dict(feature_map="elu", eps=0.5),
        "NystromAttention": dict(
            num_landmarks=4, landmarks="grid", grid_size=(2, 4), prefix_tokens=0, pinv_iterations=6, pinv_init="exact",
            residual_conv_kernel=3,
        ),
        "LinformerAttention": dict(seq_len=TOKENS, num_landmarks=5),
        "AgentAttention": dict(num_agents=4, grid_size=(2, 4), prefix_tokens=0),
        "FourierMixing": dict(norm="ortho"),
    }  # fmt: skip
    found = {}
    for name in vix_kernels.nn.__all__:
        kind, dim = getattr(vix_kernels.nn, name), HEADS * WIDTH
        parameters: dict[str, str] = {}
        for each in kind.__mro__[::-1]:
            if issubclass(each, nn.Module) and each is not nn.Module:
                parameters |= annotations(each.__init__)
        arguments = dict(dim=dim, num_heads=HEADS, attn_drop=0.0, proj_drop=0.0, backend="torch") | options[name]
        found[name] = Target(kind, arguments, parameters=parameters, skipped=("self", "norm_layer"))
        module, masked = kind(**arguments), {} if name == "FourierMixing" else dict(key_padding_mask=mask)
        x = dict(x=normal(BATCH, TOKENS, dim), rope=rope)
        found[f"{name}.forward"] = Target(
            module.forward,
            x | masked,
            parameters=annotations(kind.forward),
            skipped=("self", "attn_mask", *(("key_padding_mask",) if name == "FourierMixing" else ())),
            fixed=dict(x=(2,), key_padding_mask=(0, 1)),
        )
    return found


def integration_targets() -> dict[str, Target]:
    try:
        from vix_kernels.integrations import timm
    except (ImportError, RuntimeError):  # timm is missing, or torchvision was built for a different torch
        return {}
    model = nn.Sequential(nn.Linear(1, 1))
    return {
        "timm.replace_attention": Target(timm.replace_attention, dict(model=model, op="nystrom", retrain=True), refused=True),
        "timm.attention_layer": Target(timm.attention_layer, dict(op="nystrom", retrain=True)),
    }


# Invalid values


def wrong_values(name: str, annotation: str, right: Any, fixed: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yield (label, value) pairs with invalid values for the parameter `name`."""
    if annotation.startswith("bool"):
        return
    if "None" not in annotation:
        yield "None", None
    if "Tensor" in annotation and isinstance(right, Tensor):
        yield from wrong_tensors(right, fixed)
    elif "Rope" in annotation:
        yield from (("text", "half"), ("number", 3), ("True", True), ("tensor", torch.ones(TOKENS, WIDTH)), ("list", [1.0]))
    elif "Literal" in annotation or name in ("backend", "op", "name", "pattern"):
        yield from (("number", 3), ("list", ["exact"]), ("tensor", torch.ones(2)))
        if name != "pattern":
            yield from (("unknown text", "nystrm"), ("empty text", ""))
    elif "tuple[int, int]" in annotation:
        yield from (
            ("number", 4), ("text", "24"), ("floats", (2.0, 4.0)), ("three", (2, 2, 2)), ("one", (8,)), ("negative", (-2, -4)),
            ("zeros", (0, 8)), ("texts", ("2", "4")),
        )  # fmt: skip
    elif annotation.startswith("int"):
        yield from (
            ("text", "a"),
            ("float", 1.5),
            ("whole float", 4.0),
            ("list", [4]),
            ("True", True),
            ("tensor", torch.ones(2)),
        )
        if COUNTS.fullmatch(name):
            yield from (("zero", 0), ("negative", -1))
        elif name != "token" and name != "seed":
            yield "negative", -1
    elif annotation.startswith("float"):
        yield from (
            ("text", "a"), ("list", [0.5]), ("inf", float("inf")), ("nan", float("nan")), ("tensor", torch.tensor(0.5)),
            ("negative", -1.0), ("-inf", -float("inf")), ("complex", 1j),
        )  # fmt: skip
        if name in POSITIVE:
            yield from (("zero", 0.0), ("zero as int", 0))
        if name.endswith("drop"):
            yield "above 1", 1.5
    else:  # models, folders, mappings, functions
        yield from (("number", 3), ("list", [1.0]))
        if name != "folder":
            yield "text", "nope"


def wrong_tensors(right: Tensor, fixed: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    yield from (("list", right.tolist()), ("number", 3), ("True", True), ("text", "q"), ("array", right.numpy()))
    yield from (("rank - 1", right[0]), ("rank + 1", right[None, None, None]), ("scalar", right.new_ones(())))
    yield "empty", right[..., :0]
    yield "meta", torch.empty_like(right, device="meta")
    for dim in fixed:
        yield f"dimension {dim} longer", torch.cat([right, right.narrow(dim, 0, 1)], dim)
        yield f"dimension {dim} shorter", right.narrow(dim, 0, max(right.shape[dim] - 1, 0))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float32):
        if dtype != right.dtype and right.dtype.is_floating_point | (dtype != torch.complex64):
            yield str(dtype), right.to(dtype)
    if right.is_floating_point():
        yield "sparse", right.to_sparse()
        yield "float8", right.to(torch.float8_e4m3fn)
        yield "half, unlike the other tensors", right.to(torch.float16)
    if right.dim() > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield "nested", torch.nested.nested_tensor([x for x in right])
            yield "jagged", torch.nested.nested_tensor([x for x in right], layout=torch.jagged)


# The check


def check(label: str, target: Target) -> list[str]:
    """Return the violations found for `target`: invalid calls that succeed, and errors that do not name the argument."""
    known = target.parameters or annotations(target.function)
    try:
        if not target.refused:
            target.function(**target.arguments)
    except Exception as error:
        return [f"{label}: the valid call raises {type(error).__name__}: {error}"]
    found = []
    for name, annotation in known.items():
        if name in target.skipped or name in ("args", "options") or (name not in target.arguments and "Tensor" in annotation):
            continue
        for kind, value in wrong_values(name, annotation, target.arguments.get(name), target.fixed.get(name, ())):
            if kind in ("meta", "half, unlike the other tensors") and unconstrained(label, name):
                continue  # no other tensor determines its dtype or device
            if problem := attempt(target, name, value, known):
                found.append(f"{label}({name}={kind}): {problem}")
    return found


def unconstrained(label: str, name: str) -> bool:
    """Return whether the argument `name` of the function `label` may differ from other tensors in float dtype and device."""
    return label in ("fourier_mixing", "FourierMixing.forward", "Rope.of", "rope_mixed") or name == "conv_weight"


def attempt(target: Target, name: str, value: Any, known: dict[str, str]) -> str | None:
    try:
        target.function(**target.arguments | {name: value})
    except (*NAMED, *target.also) as error:
        if type(error) not in (*NAMED, *target.also):  # subclasses, such as EinopsError, do not count
            return f"raises {type(error).__name__}: {first_line(error)}"
        message = str(error)
        start = re.match(r"(\w+)(\[[^\]]*\])?:", message)
        if not re.search(rf"\b{name}\b", message) and not (start and start[1] in known):
            return f"raises {type(error).__name__} without naming the argument: {first_line(error)}"
        return None
    except Exception as error:
        return f"raises {type(error).__name__}: {first_line(error)}"
    return "succeeds"


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]


def check_double_backward(backend: str) -> list[str]:
    """Return a message for each op whose double backward does not behave as documented.

    It must succeed with backend="reference". With the other backends, it must raise an error that mentions "reference".
    """
    found = []
    for label, target in targets().items():
        if label.rpartition("_")[2] not in ("attention", "mixing") or "backend" not in target.arguments:
            continue
        arguments = target.arguments | {"backend": backend}
        leaf = "x" if "x" in arguments else "q"
        x = arguments[leaf].clone().requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(target.function(**arguments | {leaf: x}).square().sum(), x, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), x)
        except RuntimeError as error:
            if backend == "reference" or "reference" not in str(error):
                found.append(f"{label}: double backward raises {first_line(error)}")
            continue
        if backend != "reference":
            found.append(f"{label}: double backward with backend={backend!r} succeeds")
    return found
