"""Tests of exported programs: in PyTorch without this library, in ONNX Runtime, and compiled ahead of time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shutil import which

import pytest
import torch
from test_models import images
from test_ops import EVERY, Record, error, run
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import vix_kernels as vk
from vix_kernels import export
from vix_kernels.__main__ import main
from vix_kernels.export import REFERENCES, decomposed, to_onnx
from vix_kernels.models import create_model, load_model, save_model
from vix_kernels.primitives import registry
from vix_kernels.primitives.aggregate import aggregate_forward
from vix_kernels.primitives.broadcast import broadcast_forward
from vix_kernels.primitives.dft import dft_forward
from vix_kernels.primitives.rotate import angle_gradient
from vix_kernels.testing import Case, OpSpec
from vix_kernels.testing.models import small_model

# Exported programs consist of about twelve steps. These compute sums of up to 100 float32 terms in a different order than the
# operators. BOUND is 84 eps, and the largest measured error is 10 eps.
BOUND = 1e-5
HEADS, WIDTH, ROWS, COLUMNS, LONGEST = 2, 16, 4, 9, 64


@pytest.fixture(scope="session")
def onnx() -> None:
    """Skip tests that use this fixture if a package for ONNX is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra: export)")


# Replacements for the operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec, case", EVERY)
def test_references_equal_the_operators(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """Compare the outputs of each operator and its reference.

    Outputs that only the kernels' backward pass reads are skipped, because references leave them empty.
    """
    with Record() as calls:
        run(spec.problem(case, dtype=dtype), backend="torch")
    calls = [(operator, args) for operator, args in calls if operator in REFERENCES]
    assert calls
    for operator, args in calls:
        with torch.no_grad():
            actual, expected = REFERENCES[operator](*args), operator(*args)
        for x, exact in zip(*(each if isinstance(each, tuple) else (each,) for each in (actual, expected)), strict=True):
            if x.shape == (0,) and operator in (aggregate_forward.registered, broadcast_forward.registered):
                continue
            assert x.shape == exact.shape and x.dtype == exact.dtype
            # The operators round rotated tokens to the dtype of the tokens.
            assert error(x, exact) < (BOUND if dtype == torch.float32 else torch.finfo(dtype).eps), operator


def test_every_forward_operator_has_a_reference() -> None:
    names = {operator._schema.name.partition("::")[2] for operator in REFERENCES}
    assert names == {name for name in registry.operators if not name.endswith("_backward")} - {"angle_gradient"}


# Functions. All functions in a dict are exported as one program, because each export takes seconds.


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PROJECTION = vk.orthogonal_projection(24, WIDTH, seed=0)
OF_HEADS = vk.orthogonal_projection(24, WIDTH, seed=1, num_heads=HEADS)
KEYS, VALUES = drawn(2, HEADS, LONGEST + 1, 8) / 3
TAPS = drawn(HEADS, 1, 5, 1)
HALF = vk.rope_1d(ROWS * COLUMNS, WIDTH - 4, layout="half", prefix_tokens=1)
AXIAL = vk.rope_axial(ROWS, COLUMNS, WIDTH, prefix_tokens=1)
MIXED = vk.rope_mixed(ROWS, COLUMNS, vk.rope_mixed_frequencies(WIDTH, HEADS, seed=0), prefix_tokens=1)
SIX = dict(num_landmarks=6, pinv_iterations=1)


def agent(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, **options) -> Tensor:
    agents, valid = q[:, :, :5], None if key_padding_mask is None else key_padding_mask[:, :5]
    return vk.agent_attention(q, k, v, agents, agent_mask=valid, key_padding_mask=key_padding_mask, **options)


# Functions with "masked" in their name are called with a mask, and with NaN and infinity in masked tokens.
ANY_TOKENS = {
    "performer, masked": partial(vk.performer_attention, projection=OF_HEADS),
    "relu, masked": vk.linear_attention,
    "elu": partial(vk.linear_attention, feature_map="elu"),
    "projected, masked": partial(vk.linear_attention, projection=PROJECTION),
    "linformer, masked": partial(vk.linformer_attention, key_projection=KEYS, value_projection=VALUES),
    "agent, masked": agent,
    "segments, masked": partial(vk.nystrom_attention, conv_weight=TAPS, **SIX),
    "segments, original": partial(vk.nystrom_attention, prefix_tokens=1, pinv_init="original", **SIX),
    "fourier, ortho": lambda q, k, v: vk.fourier_mixing(q[:, 0], norm="ortho"),
}
ON_GRID = {
    "performer, axial, masked": partial(vk.performer_attention, projection=PROJECTION, rope=AXIAL),
    "elu, half": partial(vk.linear_attention, feature_map="elu", rope=HALF),
    "linformer, mixed, masked": partial(vk.linformer_attention, key_projection=KEYS, rope=MIXED),
    "agent, axial": partial(agent, rope=AXIAL),
    "grid, mixed, masked": partial(
        vk.nystrom_attention, landmarks="grid", grid_size=(ROWS, COLUMNS), prefix_tokens=1, conv_weight=TAPS, rope=MIXED, **SIX
    ),
    "pad_front, axial": partial(vk.nystrom_attention, landmarks="pad_front", rope=AXIAL, **SIX),
    "rope, half": lambda q, k, v: torch.stack(vk.apply_rope(q, k, HALF)),
}


class Functions(nn.Module):
    def __init__(self, functions: dict[str, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        hidden = ~mask[:, None, :, None]
        junk = q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)
        each = self.functions.items()
        return tuple(f(*junk, key_padding_mask=mask) if "masked" in name else f(q, k, v) for name, f in each)


class Exported:
    """A dict of functions, exported as one program."""

    def __init__(self, functions: dict[str, Callable[..., Tensor]], sizes: list[tuple[int, int]]) -> None:
        self.names, self.module, self.sizes = list(functions), Functions(functions), sizes
        batch, tokens = Dim("batch"), Dim("tokens", min=8, max=LONGEST)
        dynamic = len({tokens for _, tokens in sizes}) > 1
        along = {0: batch, 2: tokens} if dynamic else {0: batch}
        self.shapes = along, along, along, {0: batch, 1: tokens} if dynamic else {0: batch}
        self.example = self.arguments(*sizes[0])
        self.program = torch.export.export(self.module, self.example, dynamic_shapes=self.shapes)

    @staticmethod
    def arguments(batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Return q, k, v and a mask. If there are several samples, the last sample has no valid key."""
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[-1], mask[0, :2] = False, True
        return *drawn(3, batch, HEADS, tokens, WIDTH, seed=batch), mask

    def check(self, run: Callable[..., Sequence[Tensor]]) -> None:
        for size in self.sizes:
            args = self.arguments(*size)
            outputs = zip(self.names, run(*args), self.module(*args), strict=True)
            errors = {name: error(x, expected) for name, x, expected in outputs}
            assert all(each < BOUND for each in errors.values()), (size, errors)


@pytest.fixture(scope="module", params=["any_tokens", "on_grid"])
def exported(request: pytest.FixtureRequest) -> Exported:
    on_grid = 1 + ROWS * COLUMNS
    if request.param == "any_tokens":
        return Exported(ANY_TOKENS, [(2, 37), (1, LONGEST), (5, 11)])
    return Exported(ON_GRID, [(2, on_grid), (1, on_grid), (5, on_grid)])


def operators(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if "vix_kernels" in str(node.target)}


def onnx_session(path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*args: Tensor) -> list[Tensor]:
        feeds = dict(zip(names, (each.numpy() for each in args), strict=True))
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return run


def test_onnx_functions_give_the_same_results(
    exported: Exported, onnx: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program that is converted to ONNX contains no operators from this library."""
    written = []
    replaced = export._replaced
    monkeypatch.setattr(export, "_replaced", lambda *args: written.append(replaced(*args)) or written[-1])
    path = tmp_path / "functions.onnx"
    assert to_onnx(exported.module, exported.example, path, dynamic_shapes=exported.shapes) < BOUND
    assert operators(exported.program) and not operators(written[0])
    exported.check(exported.program.module())
    exported.check(written[0].module())
    exported.check(onnx_session(path))


def test_onnx_modules_give_the_same_results(onnx: None, tmp_path: Path) -> None:
    modules = nn.Sequential(
        vk.nn.NystromAttention(WIDTH, HEADS, num_landmarks=6, prefix_tokens=1, pinv_iterations=1),
        vk.nn.LinformerAttention(WIDTH, HEADS, seq_len=LONGEST + 1, num_landmarks=8),
        vk.nn.AgentAttention(WIDTH, HEADS, num_agents=6),
    )
    shapes = ({0: Dim("batch"), 1: Dim("tokens", min=8, max=LONGEST)},)
    assert to_onnx(modules, drawn(2, 37, WIDTH), tmp_path / "modules.onnx", dynamic_shapes=shapes) < BOUND
    for shape in ((1, LONGEST, WIDTH), (5, 11, WIDTH)):
        x = drawn(*shape)
        assert error(onnx_session(tmp_path / "modules.onnx")(x)[0], modules(x).detach()) < BOUND


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vil", {}),
        ("hybrid_vin", {"position": "rope_mixed"}),
        ("levip", {}),
        ("cvt", {"mixer": "linear"}),
        ("cct", {"mixer": "agent", "position": "rope_axial"}),
        ("fnet_2d", {}),
    ],
)
def test_onnx_models_give_the_same_results(name: str, options: dict, onnx: None, tmp_path: Path) -> None:
    """A model exported with a batch of one accepts other batch sizes. Exporting keeps the training mode of each module."""
    model = create_model(name, **small_model(name, depth=1, proj_drop_rate=0.1) | options)
    model.norm.eval() if hasattr(model, "norm") else None
    modes = [module.training for module in model.modules()]
    assert to_onnx(model, images(1, 3, 8, 8), tmp_path / "model.onnx") < BOUND
    assert [module.training for module in model.modules()] == modes
    x = images(5, 3, 8, 8)
    with torch.no_grad():
        assert error(onnx_session(tmp_path / "model.onnx")(x)[0], model.eval()(x)) < BOUND


def test_a_decomposed_program_runs_without_the_library(tmp_path: Path) -> None:
    some = {name: ANY_TOKENS[name] for name in ("performer, masked", "fourier, ortho")}
    exported = Exported(some, [(2, 37), (5, 11)])
    plain = decomposed(exported.program)
    assert not operators(plain)
    torch.export.save(plain, tmp_path / "program.pt2")
    torch.save(exported.arguments(5, 11), tmp_path / "arguments.pt")
    code = (
        "import sys; sys.modules['vix_kernels'] = None\nimport torch\n"
        "torch.save(torch.export.load('program.pt2').module()(*torch.load('arguments.pt')), 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    exported.sizes = [(5, 11)]
    exported.check(lambda *args: torch.load(tmp_path / "out.pt"))


def test_a_decomposed_program_has_gradients() -> None:
    some = {name: f for name, f in ANY_TOKENS.items() if "masked" not in name}
    exported, gradients = Exported(some, [(2, 37)]), []
    for program in (decomposed(exported.program).module(), exported.module):
        *qkv, mask = exported.example
        qkv = [x.clone().requires_grad_() for x in qkv]
        sum(x.square().sum() for x in program(*qkv, mask)).backward()
        gradients.append([x.grad for x in qkv])
    assert all(error(x, expected) < BOUND for x, expected in zip(*gradients, strict=True))


@pytest.mark.skipif(not which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("plain", [False, True], ids=["as_it_is", "decomposed"])
def test_ahead_of_time_compilation_gives_the_same_results(plain: bool, tmp_path: Path) -> None:
    if plain:
        model, args, more = (
            create_model("vil", **small_model("vil", depth=1)).eval(),
            (images(2, 3, 8, 8),),
            (images(5, 3, 8, 8),),
        )
    else:
        model = Functions({name: ANY_TOKENS[name] for name in ("performer, masked", "segments, masked")})
        args, more = Exported.arguments(2, 37), Exported.arguments(5, 37)
    program = torch.export.export(model, args, dynamic_shapes=({0: Dim("batch")},) * len(args))
    # Skip compiler optimizations that take a minute.
    quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(
        decomposed(program) if plain else program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
    )
    with torch.no_grad():
        for x, expected in zip(torch._inductor.aoti_load_package(path)(*more), model(*more), strict=True):
            assert error(x, expected) < BOUND


def test_the_command_exports_saved_models_and_runs(onnx: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vix_kernels.training.trained import load_trained

    save_model(create_model("fnet", **small_model("fnet", depth=1)), tmp_path / "saved")
    small = ["--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2"]
    assert main(["train", "--model", "fnet", "--epochs", "1", "-b", "512", "--output", str(tmp_path / "run"), *small]) == 0
    trained = load_trained(tmp_path / "run", torch.device("cpu"))
    saved, x, grey = load_model(tmp_path / "saved"), images(3, 3, 8, 8), images(3, 1, 8, 8)
    for folder, pixels, logits in (("saved", x, saved(x)), ("run", grey, trained.model(trained.inputs(grey)))):
        path = tmp_path / f"{folder}.onnx"
        capsys.readouterr()
        assert main(["export", "--checkpoint", str(tmp_path / folder), "--output", str(path)]) == 0
        assert f"{logits.shape[1]} logits, relative error" in capsys.readouterr().out
        assert error(onnx_session(path)(pixels)[0], logits.detach()) < BOUND
    with pytest.raises(SystemExit) as stop:
        main(["export", "--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "none.onnx")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "no checkpoint at" in message


# Errors


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'vix_kernels\[export\]'"):
        to_onnx(vk.nn.LinearAttention(WIDTH, HEADS), drawn(2, 9, WIDTH), tmp_path / "model.onnx")


def test_without_onnxruntime_outputs_are_not_compared(onnx: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert to_onnx(vk.nn.FourierMixing(WIDTH), drawn(2, 9, WIDTH), tmp_path / "model.onnx") is None
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (3, TypeError, "x: expected a Tensor or a tuple of arguments, got int"),
        ((), TypeError, "x: expected a Tensor or a tuple of arguments, got tuple"),
        (drawn(2, 1, 8, 8), ValueError, "x: expected shape"),
        (drawn(0, 3, 8, 8), ValueError, "x: expected the same batch size >= 1 for every tensor"),
        ((drawn(2, 3, 8, 8), drawn(3)), ValueError, "x: expected the same batch size >= 1 for every tensor"),
    ],
)
def test_invalid_arguments_are_named(x: object, kind: type[Exception], words: str, onnx: None, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        to_onnx(create_model("fnet", **small_model("fnet")), x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_incorrect_file_is_not_kept(onnx: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the old one")
    monkeypatch.setattr(export, "ONNX_REFERENCES", {dft_forward.registered: lambda x, ortho, backend: x})
    with pytest.raises(RuntimeError, match=r"output 0: expected a relative error of at most 3.5e-04, got"):
        to_onnx(vk.nn.FourierMixing(WIDTH), drawn(2, 9, WIDTH), path)
    assert path.read_text() == "the old one" and list(tmp_path.iterdir()) == [path]


def test_weights_that_need_a_second_file_are_refused(onnx: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "LARGEST", 100)
    with pytest.raises(ValueError, match="model: expected at most 0.0 GiB of weights, got 0.0 GiB"):
        to_onnx(vk.nn.LinearAttention(WIDTH, HEADS), drawn(2, 9, WIDTH), tmp_path / "model.onnx")


def test_the_opset_and_the_names_are_as_requested(onnx: None, tmp_path: Path) -> None:
    import onnxruntime
    from onnx import load

    path, module, x = tmp_path / "model.onnx", vk.nn.FourierMixing(WIDTH), drawn(2, 9, WIDTH)
    with pytest.raises(ValueError, match="opset: expected a version that torch can write, such as 18, got 9"):
        to_onnx(module, x, path, opset=9)
    to_onnx(module, x, path, opset=18)
    assert load(path).opset_import[0].version == 18
    session = onnxruntime.InferenceSession(path)
    (source,), (result,) = session.get_inputs(), session.get_outputs()
    assert (source.name, source.shape, result.name, result.shape) == ("x", ["batch", 9, WIDTH], "out", ["batch", 9, WIDTH])


def test_a_backward_operator_is_refused() -> None:
    class Gradient(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return angle_gradient(x, x, AXIAL.cos, True, "torch")

    program = torch.export.export(Gradient(), (drawn(2, HEADS, 1 + ROWS * COLUMNS, WIDTH),))
    with pytest.raises(ValueError, match="program: expected a program for inference, .* operators vix_kernels.angle_gradient"):
        decomposed(program)
