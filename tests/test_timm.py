"""Tests of the timm integration on models that timm creates."""

import copy
import importlib
import inspect
import pickle
import re

import pytest
import torch
from torch import nn

from vix_kernels.models import create_model, list_models
from vix_kernels.nn.agent import Agent
from vix_kernels.nn.core import Tokens
from vix_kernels.nn.nystrom import Nystrom

timm = pytest.importorskip("timm", reason="timm is not installed")

from vix_kernels.integrations import hosts, zoo  # noqa: E402
from vix_kernels.integrations import timm as integration  # noqa: E402
from vix_kernels.integrations.sdpa import replace_sdpa  # noqa: E402
from vix_kernels.ops.pooling import most_cells  # noqa: E402

EXACT = dict(num_landmarks=16, pinv_iterations=16)  # as many landmarks as the grid has tokens


def vit(name="vit_tiny_patch16_224", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=64, num_classes=5, depth=2, **arguments).eval()


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(qk_norm=True),
        dict(scale_attn_norm=True),
        dict(reg_tokens=4, no_embed_class=True, init_values=0.1),
        dict(class_token=False, global_pool="avg"),
        dict(dynamic_img_size=True),
    ],
    ids=repr,
)
def test_nystrom_with_all_landmarks_reproduces_a_vit(arguments):
    model, x = vit(**arguments), images()
    expected = model.forward_features(x)
    keys = list(model.state_dict())
    report = integration.replace_attention(model, "nystrom", **EXACT)
    assert report.replaced == ["blocks.0.attn", "blocks.1.attn"] and not report.refused
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-3, rtol=1e-3)
    core = model.blocks[0].attn.vix.placed()
    assert core.prefix_tokens == model.num_prefix_tokens
    assert core.grid_size == (4, 4) and core.landmarks == "grid"


def test_gated_attention_is_supported():
    torch.manual_seed(0)
    host = timm.layers.Attention(32, num_heads=2, gated=True, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    model, x = nn.Sequential(host), torch.randn(2, 16, 32)
    expected = model(x)
    integration.replace_attention(model, "nystrom", **EXACT)
    torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-3)


EVAS = {
    "eva02_tiny_patch14_224": {},  # interleaved layout, and biases for q and v
    "eva02_base_patch14_224": {},  # separate linear layers for q, k and v
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},  # learned angles, with one table for each layer and head
    "vit_small_patch16_dinov3": {},  # half layout, and register tokens
}


@pytest.mark.parametrize("name", EVAS)
def test_models_with_rotary_embedding_are_reproduced(name):
    torch.manual_seed(0)
    side = 56 if "patch14" in name else 64
    model = timm.create_model(name, img_size=side, num_classes=5, depth=2).eval()
    x = images()[..., :side, :side]
    learned = [n for n, p in model.named_parameters() if "rope" in n]
    expected = model.forward_features(x)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    integration.replace_attention(model, "nystrom", **EXACT)
    out = model.forward_features(x)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    out.square().sum().backward()
    for parameter in [*learned, "blocks.0.attn.proj.weight"]:
        grad, host_grad = model.get_parameter(parameter).grad, gradients[parameter]
        assert host_grad.norm() > 0 and (grad - host_grad).norm() < 1e-2 * host_grad.norm(), parameter
    assert ("mixed" in name) == bool(learned)


def test_rotations_match_timm():
    """Compare the rotation of q and k with that of timm, in both layouts, with one table per head or one for all heads."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    from vix_kernels import apply_rope

    torch.manual_seed(0)
    angles = torch.randn(3, 10, 8)
    q, k = torch.randn(2, 2, 3, 12, 16).unbind()
    for half in (False, True):
        doubled = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
        for table in (torch.cat([doubled.sin(), doubled.cos()], -1), torch.cat([doubled[0].sin(), doubled[0].cos()], -1)):
            for actual, x in zip(apply_rope(q, k, integration.rope_of(table, 2, 3, half)), (q, k), strict=True):
                expected = torch.cat([x[:, :, :2], apply_rot_embed_cat(x[:, :, 2:], table, half=half)], 2)
                torch.testing.assert_close(actual, expected)
    with pytest.raises(NotImplementedError, match=r"rope: expected a table .*got \(2, 1, 10, 32\)"):
        integration.rope_of(torch.zeros(2, 1, 10, 32), 2, 3, False)


@pytest.mark.parametrize("op", integration.OPS)
def test_replaced_models_train(op):
    model = vit(proj_drop_rate=0.1, drop_path_rate=0.1).train()
    integration.replace_attention(model, op, retrain=True)
    model(images()).square().sum().backward()
    # The head reads only the class token. In the last block, the row of this token is exact, so it does not use the features.
    reached = {name: p.grad for name, p in model.named_parameters() if not name.startswith("blocks.1.attn.vix.")}
    assert all(grad.isfinite().all() and grad.any() for grad in reached.values())
    seeds = [getattr(block.attn.vix.core, "seed", None) for block in model.blocks]
    assert op != "performer" or seeds == [0, 1]
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(images()), model.eval()(images()))


def test_attention_dropout_is_ignored_on_request():
    model, x = vit(attn_drop_rate=0.1).train(), images()
    integration.replace_attention(model, "nystrom")
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0, got 0.1: .*dropout='ignore'"):
        model(x)
    integration.replace_attention(model, "nystrom", dropout="ignore")
    out = model(x)
    assert torch.equal(out, model.eval()(x))
    built = vit(attn_drop_rate=0.1, attn_layer=integration.attention_layer("nystrom", dropout="ignore")).train()
    assert built(x).isfinite().all()


def test_landmarks_are_placed_on_the_grid():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(96, 192), depth=1, num_classes=5)
    integration.replace_attention(nn.Sequential(model), "nystrom")  # the model may be a child of another module
    core = model.blocks[0].attn.vix.placed()
    assert core == Nystrom.made("host", num_landmarks=60, landmarks="grid", grid_size=(6, 12), prefix_tokens=1, exact_prefix=1)
    model(torch.randn(1, 3, 96, 192))
    integration.replace_attention(model, "agent", retrain=True)
    assert model.blocks[0].attn.vix.placed() == Agent(num_agents=48, grid_size=(6, 12), prefix_tokens=1, exact_prefix=1)
    assert len(model.patch_embed._forward_hooks) == 1
    integration.replace_attention(model, "nystrom", landmarks="segment")
    assert model.blocks[0].attn.vix.placed() == Nystrom.made("host", landmarks="segment", prefix_tokens=1)
    model(torch.randn(1, 3, 96, 192))
    dropping = vit(patch_drop_rate=0.25).train()
    assert "4 landmarks in segments" in str(integration.replace_attention(dropping, "nystrom", num_landmarks=4))
    dropping(images())
    assert [most_cells(grid, 64) for grid in ((14, 14), (32, 32), (7, 10), (1, 9), (100, 100))] == [64, 64, 63, 9, 64]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_landmarks_are_placed_on_the_grid_of_the_call(name):
    """For each image size, the outputs equal those of a copy whose landmarks are fixed to the grid of that size."""
    torch.manual_seed(0)
    arguments = {} if "dinov3" in name else dict(dynamic_img_size=True)
    model = timm.create_model(name, img_size=64, depth=2, num_classes=5, **arguments).eval()
    report = integration.replace_attention(model, "nystrom", num_landmarks=8)
    prefix = model.num_prefix_tokens
    words = f"nystrom, 8 landmarks on the grid 4 x 4, {prefix} prefix token"
    assert words in str(report) and words in repr(model) and words in report.attentions["blocks.1.attn"]
    for height, width in ((64, 64), (32, 96), (96, 32)):
        x = torch.randn(2, 3, height, width)
        fixed = copy.deepcopy(model)
        for block in fixed.blocks:
            block.attn.vix.grid = None
            block.attn.vix.core = block.attn.vix.core.on_grid((height // 16, width // 16))
        assert torch.equal(model(x), fixed(x))
        assert "on the grid 4 x 4" in repr(copy.deepcopy(model)) or (height, width) != (64, 64)
    again = copy.deepcopy(model)  # the copy does not share its grid with the model
    again(torch.randn(1, 3, 64, 64))
    assert model.blocks[0].attn.vix.grid.size_of() == (6, 2)
    assert again.blocks[0].attn.vix.grid.size_of() == (4, 4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for height, width in ((96, 32), (64, 64)):
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(compiled(x), model(x))


def test_checkpointing_recomputes_calls_of_several_sizes():
    torch.manual_seed(0)
    model = vit(dynamic_img_size=True).train()
    integration.replace_attention(model, "nystrom", num_landmarks=4)
    sizes, grads = ((64, 64), (32, 96)), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        generator = torch.Generator().manual_seed(1)
        sum(model(torch.randn(2, 3, *size, generator=generator)).square().sum() for size in sizes).backward()
        grads.append([each.grad.clone() for each in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_set_input_size_changes_the_grid():
    model = vit()
    integration.replace_attention(model, "nystrom", num_landmarks=16)
    model.set_input_size((96, 32))
    model(torch.randn(2, 3, 96, 32))
    assert model.blocks[0].attn.vix.placed().grid_size == (6, 2)
    assert "12 landmarks on the grid 6 x 2" in repr(model)


def test_restore_attention_restores_the_model():
    model = vit()
    expected, parameters, words = model(images()), list(model.parameters()), repr(model)
    integration.replace_attention(model, "nystrom", num_landmarks=4)
    integration.replace_attention(model, "linear", retrain=True)
    assert not torch.equal(model(images()), expected)
    assert integration.restore_attention(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert torch.equal(model(images()), expected) and repr(model) == words
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model.patch_embed._forward_hooks and type(model.blocks[0].attn) is timm.layers.Attention
    with pytest.raises(ValueError, match="model: expected a model with replaced attention, got one without"):
        integration.restore_attention(model)
    built = vit(attn_layer="vix_linear")
    expected = built(images())
    integration.replace_attention(built, "nystrom", num_landmarks=4)
    integration.restore_attention(built)
    assert torch.equal(built(images()), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_replacement_leaves_the_model_as_it_was(error, monkeypatch):
    model = vit()
    expected, words = model(images()), repr(model)
    setattr_, calls = nn.Module.__setattr__, []

    def interrupt(self, name, value):
        if name == "vix":
            calls.append(name)
            if len(calls) == 2:
                raise error
        setattr_(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", interrupt)
        with pytest.raises(error):
            integration.replace_attention(model, "nystrom", num_landmarks=4)
    assert torch.equal(model(images()), expected) and repr(model) == words and not model.patch_embed._forward_hooks


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="op: expected one of .*, 'nystrom', .*, got 'nystrm'"):
        integration.replace_attention(vit(), "nystrm")


def test_replaced_models_can_be_pickled():
    model = vit(attn_layer="vix_performer")
    integration.replace_attention(model, "nystrom")
    again = pickle.loads(pickle.dumps(vit(attn_layer="vix_performer"))), pickle.loads(pickle.dumps(model))
    assert torch.equal(again[1](images()), model(images()))
    assert again[0].blocks[0].attn.vix.op == "performer"


def test_replaced_models_run_under_autocast():
    model = vit()
    integration.replace_attention(model, "nystrom", **EXACT)
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_replaced_models_compile():
    model = vit("vit_small_patch16_rope_224")
    integration.replace_attention(model, "performer", retrain=True)
    expected = model(images())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), expected)


def test_a_second_replacement_overrides_the_first():
    model = vit()
    integration.replace_attention(model, "nystrom")
    integration.replace_attention(model, "linear", retrain=True)
    assert [block.attn.vix.op for block in model.blocks] == ["linear", "linear"]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_models_without_supported_attention_are_refused(name):
    with pytest.raises(ValueError, match=r"model: expected an attention class .*, got \d+ times timm\.models\.(swin|beit)"):
        integration.replace_attention(timm.create_model(name, img_size=224), "nystrom")


def test_replacement_without_retrain_is_refused():
    model = vit()
    expected = model(images())
    with pytest.raises(ValueError, match="retrain: expected True for 'performer'"):
        integration.replace_attention(model, "performer")
    assert torch.equal(model(images()), expected)


def test_unsupported_arguments_raise():
    model = vit(attn_drop_rate=0.1)
    integration.replace_attention(model, "nystrom")
    model(images())
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0"):
        model.train()(images())
    block, tokens = model.eval().blocks[0], torch.randn(2, 17, 192)
    padding = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    padding[1, ..., 12:] = False
    assert not torch.equal(block(tokens, attn_mask=padding)[1], block(tokens)[1])
    with pytest.raises(NotImplementedError, match="attn_mask: expected one row"):
        block(tokens, attn_mask=torch.zeros(17, 17))
    with pytest.raises(NotImplementedError, match="is_causal"):
        block(tokens, is_causal=True)


def test_models_are_built_with_attention_layers():
    classes = (
        integration.AgentAttention,
        integration.FeatureAttention,
        integration.LinearAttention,
        integration.NystromAttention,
        integration.PerformerAttention,
    )
    assert [each.attention.op for each in classes] == integration.OPS
    layer = integration.attention_layer("nystrom", num_landmarks=4, prefix_tokens=1)
    model = vit(attn_layer=layer)
    assert list(model.state_dict()) == list(vit().state_dict())
    assert model.blocks[1].attn.vix.options == dict(num_landmarks=4, prefix_tokens=1)
    by_name = vit(attn_layer="vix_linear")
    assert by_name.blocks[0].attn.vix.op == "linear"
    by_name(images()).sum().backward()
    again = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(again(images()), model(images()))


REFUSED = r"attn_layer: expected weights trained with 'performer\+exact' .*blocks\.0\..*, got weights trained with "


def test_weights_of_another_attention_are_refused(tmp_path):
    model, softmax, linear = vit(attn_layer="vix_performer"), vit().state_dict(), vit(attn_layer="vix_linear").state_dict()
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(saved) == len(softmax) + 2
    model.load_state_dict(saved)
    attention = {key: value for key, value in softmax.items() if ".attn." in key}
    for state, strict in ((softmax, True), (softmax, False), (attention, False)):
        with pytest.raises(
            RuntimeError, match=REFUSED + r"'softmax' \(no mark\).*attention_layer\('performer', retrain=True\)"
        ):
            model.load_state_dict(state, strict=strict)
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items() if ".attn." in key)
    with pytest.raises(RuntimeError, match=REFUSED + "'linear'; use attn_layer"):
        model.load_state_dict(linear)
    prefixed = nn.ModuleDict({"module": model})
    with pytest.raises(RuntimeError, match="module.blocks.0.attn._extra_state"):
        prefixed.load_state_dict({f"module.{key}": value for key, value in softmax.items()})
    prefixed.load_state_dict({f"module.{key}": value for key, value in saved.items()})
    shapes = {key: value.to("meta") for key, value in saved.items()}
    copy.deepcopy(model).load_state_dict(shapes, assign=True)
    with pytest.raises(RuntimeError, match=REFUSED + r"'\{\}'"):
        model.load_state_dict(saved | {"blocks.0.attn._extra_state": {}})
    others = {key: value for key, value in softmax.items() if "attn" not in key}  # without the weights of attention layers
    assert len(model.load_state_dict(others, strict=False).missing_keys) == len(saved) - len(others)
    file = tmp_path / "softmax.pth"
    torch.save(softmax, file)
    with pytest.raises(RuntimeError, match=REFUSED):
        vit(attn_layer="vix_performer", pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=5))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*_extra_state"):
        vit().load_state_dict(saved)
    vit(attn_layer="vix_nystrom").load_state_dict(softmax)  # accepted, because Nystrom approximates softmax


def test_retrain_loads_any_weights_and_marks_them():
    softmax, layer = vit().state_dict(), integration.attention_layer("performer", retrain=True, num_features=8)
    model = pickle.loads(pickle.dumps(vit(attn_layer=layer)))
    for state in (softmax, vit(attn_layer="vix_linear").state_dict()):
        assert not any(model.load_state_dict(state))
    assert torch.equal(model.blocks[1].attn.qkv.weight, softmax["blocks.1.attn.qkv.weight"])
    vit(attn_layer=integration.attention_layer("performer", num_features=8)).load_state_dict(model.state_dict())
    replaced = vit(attn_layer="vix_performer")
    integration.replace_attention(replaced, "linear", retrain=True)
    replaced.load_state_dict(softmax)
    averaged = {
        key: (value.double() / 3 + value.double() / 3 + value.double() / 3).float()
        for key, value in replaced.state_dict().items()
    }
    vit(attn_layer="vix_linear").load_state_dict(averaged)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vix_vip_tiny"])
def test_timm_averages_and_saves_the_weights(name, tmp_path):
    from safetensors.torch import load_model, save_model
    from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

    def build():
        if name == "vix_vip_tiny":
            return timm.create_model(name, num_classes=5, depth=2).eval()
        return vit(name, attn_layer="vix_performer")

    model, x = build(), torch.randn(2, 3, 32, 32) if name == "vix_vip_tiny" else images()
    if name == "vix_vip_tiny":
        model.blocks[1].attn.redraws = 3
    expected = model(x)
    for average in (ModelEma(model), ModelEmaV2(model), ModelEmaV3(model), ModelEmaV3(model, foreach=False)):
        for _ in range(3):
            average.update(model)
        inner = average.ema if isinstance(average, ModelEma) else average.module
        averaged, expected_state = inner.state_dict(), model.state_dict()
        assert all(torch.equal(averaged[key], expected_state[key]) for key in expected_state if key.endswith("_extra_state"))
        torch.testing.assert_close(inner(x), expected)
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(again := build(), tmp_path / "model.safetensors")
    assert torch.equal(again(x), expected)
    assert name != "vix_vip_tiny" or again.blocks[1].attn.redraws == 3
    timm.models.save_for_hf(model, tmp_path / "hub", model_config=dict(num_classes=5), safe_serialization=True)
    weights = timm.models.load_state_dict(tmp_path / "hub" / "model.safetensors")
    again = build()
    again.load_state_dict(weights)
    assert torch.equal(again(x), expected)


def test_saved_models_load_from_their_folder(tmp_path):
    options = dict(img_size=64, depth=2, num_classes=5, attn_layer="vix_agent")
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    timm.models.save_for_hf(model, tmp_path, model_config=dict(num_classes=5), model_args=options)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "arguments", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", dict(dynamic_img_size=True, reg_tokens=4), 5),
        ("deit_tiny_distilled_patch16_224", {}, 2),  # the model sets its number of prefix tokens after it builds its blocks
        ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg"), 0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("op", ["nystrom", "agent"])
def test_layers_and_replacements_use_the_same_grid(name, arguments, prefix, op):
    built, replaced = vit(name, **arguments, attn_layer=f"vix_{op}"), vit(name, **arguments)
    integration.replace_attention(replaced, op, retrain=True)
    replaced.load_state_dict({key: value for key, value in built.state_dict().items() if "_extra_state" not in key})
    built = pickle.loads(pickle.dumps(copy.deepcopy(built)))
    for size in ((64, 64), (64, 96))[: 1 + ("dynamic_img_size" in arguments)]:
        x = torch.randn(2, 3, *size)
        assert torch.equal(built(x), replaced(x))
        core = built.blocks[1].attn.vix.placed()
        assert core == replaced.blocks[1].attn.vix.placed()
        assert core.grid_size == (4, size[1] // 16) and core.prefix_tokens == prefix
    assert "on the grid 4 x" in repr(built)
    built.reset_classifier(3)
    integration.replace_attention(built, "linear", retrain=True)
    assert integration.restore_attention(built) == ["blocks.0.attn", "blocks.1.attn"]
    assert built.blocks[1].attn.vix.placed() == core
    built(x)
    with pytest.raises(ValueError, match="got one without"):
        integration.restore_attention(built)


def test_padded_segments_treat_class_tokens_like_other_tokens():
    ours = create_model("vit", img_size=64, patch_size=16, depth=2)
    for model, replace in ((vit(), integration.replace_attention), (ours, zoo.replace_attention)):
        replace(model, "nystrom", landmarks="pad_front", num_landmarks=4)
        cores = [getattr(block.attn, "vix", block.attn).core for block in model.blocks]
        assert all(core.prefix_tokens == 0 and not core.exact_rows(Tokens()) for core in cores)
        assert model(images()).isfinite().all()


def test_options_can_turn_off_grid_landmarks():
    model = vit(attn_layer=integration.attention_layer("nystrom", num_landmarks=4, landmarks="segment"))
    assert model.blocks[0].attn.vix.placed() == Nystrom.made("host", num_landmarks=4, landmarks="segment", prefix_tokens=1)
    assert "in segments" in repr(vit(attn_layer="vix_nystrom", patch_drop_rate=0.25))
    alone = integration.NystromAttention(32, num_heads=2)
    assert alone(torch.randn(1, 9, 32)).shape == (1, 9, 32)


def test_the_zoo_is_registered():
    assert timm.list_models("vix_*") == sorted(f"vix_{name}" for name in list_models())
    torch.manual_seed(0)
    model = timm.create_model("vix_vin_tiny", num_classes=7, in_chans=1, drop_path_rate=0.1, depth=2)
    torch.manual_seed(0)
    direct = create_model("vin_tiny", num_classes=7, in_chans=1, drop_path_rate=0.1, depth=2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True))
    data = timm.data.resolve_data_config({}, model=model)
    assert data["input_size"] == (3, 32, 32)  # as in timm, this is the registered size, not that of this model
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vix_vin_tiny"):
        timm.create_model("vix_vin_tiny", pretrained=True)
    with pytest.raises(NotImplementedError, match="attn_drop_rate: expected 0"):
        timm.create_model("vix_vin_tiny", attn_drop_rate=0.1)
    with pytest.raises(TypeError, match="no argument 'num_head'"):
        timm.create_model("vix_vin_tiny", num_head=2)
    assert timm.create_model("vix_vin_tiny", attn_drop_rate=0.0, depth=1, device="meta").pos_embed.is_meta


@pytest.mark.parametrize("name", list_models("*_tiny") + list_models("*_base") + ["vit", "levip", "cvn", "ccp", "fnet_2d"])
def test_registered_configurations_describe_the_models(name):
    registered = timm.get_pretrained_cfg(f"vix_{name}")
    model = timm.create_model(f"vix_{name}", device="meta", num_classes=3, img_size=128 if name.endswith("_base") else 64)
    assert model.default_cfg == registered.to_dict() and model.num_classes == 3
    model = timm.create_model(f"vix_{name}", device="meta")
    convolutions = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert registered.first_conv == convolutions[0] and registered.classifier == "head"
    assert registered.pool_size == model.levels()[-1].grid and registered.fixed_input_size
    assert registered.input_size == (model.in_chans, *model.img_size) and registered.num_classes == model.num_classes
    groups = timm.models._manipulate.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["vix_hybrid_vip_tiny", "vix_levin_tiny", "vix_cvp_tiny", "vix_ccn_tiny", "vix_fnet_2d_tiny"])
def test_features_only_fx_and_jit_trace_of_the_zoo(name):
    torch.manual_seed(0)
    depth = (1, 1, 1) if name.startswith(("vix_le", "vix_cv")) else 3
    model, x = timm.create_model(name, depth=depth).eval(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    features = timm.create_model(name, depth=depth, features_only=True).eval()
    for found, expected in zip(features(x), model.forward_intermediates(x, 3, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected)
    graph = timm.models.create_feature_extractor(model, {"norm": "tokens", "head": "logits"})
    found = graph(x)
    torch.testing.assert_close(found["tokens"], model.forward_features(x))
    torch.testing.assert_close(found["logits"], model(x))
    trace = torch.jit.trace(model, x)
    torch.testing.assert_close(trace(x), model(x), atol=1e-5, rtol=1e-5)
    assert "vix_kernels::" not in str(trace.inlined_graph) and "PythonOp" not in str(trace.inlined_graph)


def test_the_zoo_loads_weights_from_files(tmp_path):
    options = dict(depth=2, num_classes=4)
    model, x = timm.create_model("vix_vin_tiny", **options).eval(), torch.randn(2, 3, 32, 32)
    timm.models.save_for_hf(model, tmp_path, model_config=dict(num_classes=4), model_args=options, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=4)
    larger = timm.create_model("vix_vin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, **options).eval()
    model.set_input_size(48)
    assert torch.equal(larger(torch.ones(1, 3, 48, 48)), model(torch.ones(1, 3, 48, 48)))
    gray = timm.create_model(
        "vix_vin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, depth=2, num_classes=9
    )
    assert gray(torch.ones(1, 1, 32, 32)).shape == (1, 9)


def test_torch_fx_traces_replaced_models():
    model = vit()
    integration.replace_attention(model, "nystrom")
    graph = timm.models.create_feature_extractor(model, {"blocks.1": "tokens", "head": "logits"})
    torch.testing.assert_close(graph(images())["logits"], model(images()))


@pytest.mark.parametrize("name", ["vit_pwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"])
def test_blocks_that_compute_attention_are_refused(name):
    with pytest.raises(ValueError, match=r"got 2 times timm.models.vision_transformer.(Diff)?ParallelScalingBlock"):
        integration.replace_attention(timm.create_model(name, device="meta", depth=2), "nystrom")


def test_unsupported_timm_versions_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "version", lambda package: "0.9.16")
        with pytest.raises(ImportError, match=re.escape("timm: expected version 1.0.28 or newer, got 0.9.16")):
            importlib.reload(integration)
    monkeypatch.delattr("timm.models.vision_transformer.ATTN_LAYERS")
    moved = rf"timm {re.escape(timm.__version__)}: cannot import a name that vix_kernels needs; .*ATTN_LAYERS"
    with pytest.raises(ImportError, match=moved):
        importlib.reload(integration)


@pytest.mark.parametrize("maps", [{}, dict(qkv_fused=False), dict(qkv_fused=False, num_kv_heads=2)], ids=repr)
def test_fused_and_separate_maps_and_grouped_heads_are_supported(maps):
    torch.manual_seed(0)
    if not set(maps) <= set(inspect.signature(timm.layers.AttentionRope).parameters):
        pytest.skip(f"timm {timm.__version__} has no grouped heads")
    options = dict(num_prefix_tokens=1, qk_norm=True, norm_layer=nn.LayerNorm)
    host = timm.layers.AttentionRope(64, num_heads=4, **options, **maps)
    model = nn.Sequential(copy.deepcopy(host))
    integration.replace_attention(model, "nystrom", num_landmarks=16, pinv_iterations=16, prefix_tokens=1)
    x = torch.randn(2, 17, 64)
    rope = timm.layers.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[4, 4]).get_embed()
    torch.testing.assert_close(model[0](x, rope=rope), host(x, rope=rope), rtol=1e-3, atol=1e-3)


def test_replace_sdpa_reaches_timm():
    model = vit()
    expected = model(images())
    with replace_sdpa("nystrom", num_landmarks=17, pinv_iterations=16) as swap:
        torch.testing.assert_close(model(images()), expected, atol=1e-3, rtol=1e-3)
    assert swap.served == 2 and not swap.fell_back


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = vit()
    integration.replace_attention(model, "performer", retrain=True, num_features=16)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()(images()).square().sum().backward()
        grads.append([each.grad.clone() for each in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
