"""Tests that an attention core (nn/core.py) registered by user code works in all models and integrations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from vix_kernels import rope_1d
from vix_kernels.integrations.drop_in import OPS, DropIn
from vix_kernels.nn.core import CORES, SdpaArgs, Site, register
from vix_kernels.nn.module import AttentionModule, make_module
from vix_kernels.nn.nystrom import Nystrom
from vix_kernels.nn.softmax import Softmax
from vix_kernels.testing import SPECS, Case, draw
from vix_kernels.testing import register as register_operator

EVEN = '''
from dataclasses import dataclass
import torch
from vix_kernels.nn.core import Core, register

@register("even")
@dataclass(frozen=True)
class Even(Core):
    """Every query gets the mean of the valid values, times `factor`."""

    factor: float = 1.0

    def attend(self, module, q, k, v, *, scale, rope, tokens, sdpa, backend):
        mask = tokens.key_padding_mask
        weights = v.new_ones(v.shape[0], v.shape[2]) if mask is None else mask.to(v.dtype)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        return self.factor * torch.einsum("bn,bhnd->bhd", weights, v)[:, :, None].expand(-1, -1, q.shape[2], -1)
'''
LEARNED = """
from dataclasses import dataclass
import torch
from torch import nn
from vix_kernels.nn.core import Core, register

@register("learned")
@dataclass(frozen=True)
class Learned(Core):
    def state(self, site):
        return {"gain": nn.Parameter(torch.ones(site.num_heads))}

    def attend(self, module, q, k, v, *, scale, rope, tokens, sdpa, backend):
        return v.mean(2, keepdim=True).expand_as(q) * module.gain[:, None, None]
"""
USES = {
    "zoo": """
from vix_kernels.models import create_model, list_models
model = create_model("vit", mixer="even", factor=2.0, img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2)
model(torch.randn(2, 3, 8, 8)).sum().backward()
assert model.blocks[1].attn.core.factor == 2.0
""",
    "timm": """
import timm
from vix_kernels.integrations.timm import replace_attention
sizes = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2)
vit = timm.create_model("vit_tiny_patch16_224", **sizes)
try:
    replace_attention(vit, "even")
except ValueError as error:
    assert "retrain: expected True for 'even'" in str(error)
assert len(replace_attention(vit, "even", retrain=True).replaced) == 2
vit(torch.randn(1, 3, 32, 32)).sum().backward()
built = timm.create_model("vit_tiny_patch16_224", attn_layer="vix_even", **sizes)
assert "even, factor 1.0" in repr(built)
""",
    "transformers": """
import transformers
from vix_kernels.integrations.transformers import register
register(retrain=True)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
model = transformers.ViTModel(transformers.ViTConfig(**sizes))
model.set_attn_implementation("vix_even")
model(torch.randn(1, 3, 32, 32)).last_hidden_state.sum().backward()
""",
    "torch.nn": """
from torch import nn
from torch.nn import functional as F
from vix_kernels.integrations.sdpa import replace_sdpa
from vix_kernels.integrations.torch_nn import replace_mha
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 1)
assert len(replace_mha(encoder, "even", retrain=True).replaced) == 1
encoder(torch.randn(1, 6, 32)).sum().backward()
q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
with replace_sdpa("even", retrain=True) as swap:
    out = F.scaled_dot_product_attention(q, k, v)
assert swap.served == 1
torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))
""",
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("use", USES)
def test_a_registered_core_works_everywhere(use: str, late: bool, tmp_path: Path) -> None:
    """The core may be registered before or after the integrations are imported."""
    if not find_spec(use.partition(".")[0]) and use != "zoo":
        pytest.skip(f"{use} is not installed")
    (tmp_path / "even.py").write_text(EVEN)
    modules = {"timm": "timm", "transformers": "transformers", "torch.nn": "torch_nn"}
    first = f"import vix_kernels.integrations.{modules[use]}\n" if late and use in modules else ""
    code = "import torchvision_operators, torch\nkept = torchvision_operators.declare()\n" + first + "import even\n" + USES[use]
    path = [str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_core_with_parameters_is_a_child_module_of_its_host(tmp_path: Path) -> None:
    """The host module's child `vix` holds the core's parameters. If no module can hold them, an error names the core."""
    pytest.importorskip("timm")
    (tmp_path / "learned.py").write_text(LEARNED)
    code = """
import torchvision_operators
kept = torchvision_operators.declare()
import copy, learned, pytest, timm, torch
from torch import nn
from vix_kernels.integrations.drop_in import DropIn
from vix_kernels.integrations.sdpa import replace_sdpa
from vix_kernels.integrations.timm import attention_layer, replace_attention, restore_attention
from vix_kernels.integrations.torch_nn import replace_mha
from vix_kernels.models import create_model

model = create_model("vit", mixer="learned", img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2)
model(torch.randn(2, 3, 8, 8)).sum().backward()
assert model.blocks[0].attn.gain.grad is not None

sizes = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2)
vit, x = timm.create_model("vit_tiny_patch16_224", **sizes).eval(), torch.randn(1, 3, 32, 32)
keys, expected = list(vit.state_dict()), vit(x)
replace_attention(vit, "learned", retrain=True)
assert set(vit.state_dict()) - set(keys) == {"blocks.0.attn.vix.gain", "blocks.1.attn.vix.gain"}
vit(x).sum().backward()
assert all(block.attn.vix.gain.grad is not None for block in vit.blocks)
other = copy.deepcopy(vit)
other.blocks[0].attn.vix.gain.data.fill_(3.0)
other.load_state_dict(vit.state_dict())
assert torch.equal(other(x), vit(x)) and other.blocks[0].attn.vix.gain is not vit.blocks[0].attn.vix.gain
restore_attention(vit)
assert list(vit.state_dict()) == keys and torch.equal(vit(x), expected)

layer = attention_layer("learned")(32, 2, dtype=torch.float64, device="meta")
assert layer.vix.gain.dtype == torch.float64 and layer.vix.gain.is_meta
built = timm.create_model("vit_tiny_patch16_224", attn_layer=attention_layer("learned"), **sizes).eval()
built.blocks[1].attn.vix.gain.data.fill_(2.0)
expected = built(x)
replace_attention(built, "nystrom", num_landmarks=4)
assert not any(name.endswith("gain") for name in built.state_dict())
restore_attention(built.double().eval())
vix = built.blocks[1].attn.vix
assert not vix.training and vix.gain.dtype == torch.float64 and (built(x.double()) - expected).abs().max() < 1e-5

encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
replace_mha(encoder, "nystrom", retrain=True, num_landmarks=2, residual_conv_kernel=3)
assert encoder.layers[1].self_attn.vix.res_conv.weight.shape == (2, 1, 3, 1)
encoder(torch.randn(1, 6, 32)).sum().backward()

encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.1, batch_first=True), 1).double().eval()
replace_mha(encoder, "nystrom", retrain=True, num_landmarks=2, residual_conv_kernel=3)
vix = encoder.layers[0].self_attn.vix
assert vix.res_conv.weight.dtype == torch.float64 and not vix.training and not vix.res_conv.training
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, device="meta"), 1)
replace_mha(encoder, "nystrom", retrain=True, num_landmarks=2, residual_conv_kernel=3)
assert all(x.is_meta for x in encoder.parameters())

for make in (replace_sdpa, lambda *args, **options: DropIn(*args, **options)(x, x, x)):
    with pytest.raises(ValueError, match="op: expected attention without parameters, got Learned"):
        make("learned", retrain=True)
"""
    path = [str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_imports_a_core_first(tmp_path: Path) -> None:
    (tmp_path / "even.py").write_text(EVEN)
    command = [sys.executable, "-m", "vix_kernels", "--import", "even", "train", "--model", "vit", "--epochs", "1"]
    command += ["--warmup-epochs", "0", "--output", "run", "--model-kwargs", "mixer=even", "factor=0.5", "depth=1"]
    done = subprocess.run([*command, "embed_dim=16", "num_heads=2"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "train.py").write_text(EVEN)  # a module may have the same name as a command
    named = subprocess.run([*command[:4], "train", "models", "vit_tiny*"], capture_output=True, text=True, cwd=tmp_path)
    assert named.returncode == 0 and named.stdout.startswith("model"), named.stderr
    wrong = subprocess.run([*command[:4], "nothing", "models"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr == "vix: error: --import: cannot import nothing: No module named 'nothing'\n"


def test_arguments_that_a_core_does_not_accept_are_refused() -> None:
    class Plain(Nystrom):
        name = "plain"

        def accepts(self) -> frozenset[str]:
            return frozenset()

    module, x = make_module(Plain(num_landmarks=2), 16, num_heads=2), torch.randn(1, 6, 16)
    for argument, given in (("rope", rope_1d(6, 8)), ("key_padding_mask", torch.ones(1, 6, dtype=torch.bool))):
        with pytest.raises(NotImplementedError, match=f"^{argument}: expected None, got .* plain attention does not"):
            module(x, **{argument: given})


def test_operator_names_are_unique() -> None:
    spec = SPECS["apply_rope"]
    with pytest.raises(ValueError, match="name: expected an unused name, got 'apply_rope'"):
        register_operator(replace(spec, reference=spec.function))
    assert SPECS["apply_rope"] is spec


def test_fixed_tensors_get_gradients_only_if_features_are_learned() -> None:
    """The tensors that a specification lists in `fixed` receive gradients only in cases with learned=True."""
    spec = replace(SPECS["performer_attention"], fixed=("v",))
    for learned, trained in ((False, {"q", "k", "projection"}), (True, {"q", "k", "v", "projection"})):
        problem = draw(spec, Case("small", learned=learned), torch.float32, "cpu")
        assert {name for name, x in problem.tensors.items() if x.requires_grad} == trained


def test_registered_names_are_unique() -> None:
    with pytest.raises(ValueError, match="name: expected an unused name, got 'nystrom', the name of Nystrom"):
        register("nystrom")(type("Other", (Nystrom,), {}))
    assert CORES["nystrom"] is Nystrom


@pytest.mark.parametrize("argument", ["cu_seqlens", "group"])
@pytest.mark.parametrize("name", CORES)
def test_unsupported_arguments_are_refused_by_name(name: str, argument: str) -> None:
    what = {"cu_seqlens": "packed samples", "group": "a process group"}[argument]
    given = {argument: torch.tensor([0, 2, 6], dtype=torch.int32) if argument == "cu_seqlens" else object()}
    site = Site(8, 2, grid_size=(2, 3), num_tokens=6)
    with pytest.raises(NotImplementedError, match=f"^{argument}: expected None, got {what}; "):
        make_module(CORES[name].made("module"), 16, num_heads=2, site=site)(torch.randn(1, 6, 16), **given)
    if name in OPS:
        q = torch.randn(1, 2, 6, 8)
        with pytest.raises(NotImplementedError, match=f"^{argument}: expected None, got {what}; "):
            DropIn(name, retrain=True)(q, q, q, **given)


@pytest.mark.parametrize("name", ["nystrom", "agent"])
def test_the_grid_of_a_call_overrides_that_of_the_core(name: str) -> None:
    """Landmarks and agents are placed on the grid that is passed to the call."""
    options = {"nystrom": dict(num_landmarks=4, landmarks="grid"), "agent": dict(num_agents=4)}[name]
    torch.manual_seed(0)
    module = make_module(CORES[name](**options, grid_size=(4, 6)), 16, num_heads=2)
    other = make_module(module.core.on_grid((6, 4)), 16, num_heads=2)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 24, 16)
    assert torch.equal(module(x, grid_size=(6, 4)), other(x)) and not torch.allclose(module(x), other(x))
    q, k, v = torch.randn(3, 2, 2, 24, 8).unbind()
    hosts = [DropIn(name, retrain=True, **options, grid_size=size) for size in ((4, 6), (6, 4))]
    assert torch.equal(hosts[0](q, k, v, grid_size=(6, 4)), hosts[1](q, k, v))


@pytest.mark.parametrize("name", ["performer", "linear", "softmax"])
def test_cores_without_slots_on_a_grid_accept_a_prefix_of_any_length(name: str) -> None:
    """The output does not depend on the grid size. The grid may have fewer tokens than the input, but not more."""
    module, x = make_module(CORES[name](), 16, num_heads=2).eval(), torch.randn(2, 25, 16)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(module(x, grid_size=(4, 6)), module(x))
    assert torch.equal(compiled(x, grid_size=(4, 6)), module(x))
    for grid in ((5, 6), (-5, -5), (0, 4)):
        with pytest.raises(ValueError, match="grid_size: expected positive integers with height . width <= 25 tokens, got"):
            module(x, grid_size=grid)


def test_a_core_that_supports_causal_attention_is_told_about_it() -> None:
    class Causal(Softmax):
        def accepts(self) -> frozenset[str]:
            return super().accepts() | {"causal"}

        def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, sdpa: SdpaArgs, **others: Any) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=sdpa.causal)

    module, x = AttentionModule(Causal(), 16, 2), torch.randn(1, 5, 16)
    assert_close(module(x, is_causal=True)[:, 0], module(x[:, :1])[:, 0])
    assert not torch.equal(module(x)[:, 0], module(x, is_causal=True)[:, 0])
