"""Tests that save_pretrained and from_pretrained of transformers keep a model's attention implementation."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vix_kernels.integrations import transformers as integration  # noqa: E402
from vix_kernels.integrations.hosts import Snapshot  # noqa: E402
from vix_kernels.integrations.swap import holders  # noqa: E402

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
VISION = SIZES | dict(image_size=32, patch_size=8)
TEXT = SIZES | dict(vocab_size=50, bos_token_id=0, eos_token_id=1)
MODELS = {"head": transformers.ViTForImageClassification, "body": transformers.ViTModel}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    integration.register()


def vit(kind: str = "head") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind](transformers.ViTConfig(**VISION, initializer_range=0.5)).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


def run(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            return model(pixel_values=images, input_ids=torch.arange(2, 9)[None].expand(2, -1)).image_embeds
        return model(pixel_values=images)[0]


def loads_like(model: nn.Module, folder: Path) -> nn.Module:
    """Save `model`, register the default options again, and return the loaded model.

    Check that loaded models and copies give bit-identical outputs.
    """
    expected, entries = run(model), set(vars(model.config))
    model.save_pretrained(folder)
    assert set(vars(model.config)) == entries
    integration.register()
    loaded = type(model).from_pretrained(folder).eval()
    loaded.save_pretrained(folder / "again")
    for each in (loaded, copy.deepcopy(loaded), type(model).from_pretrained(folder / "again").eval()):
        assert torch.equal(run(each), expected)
    return loaded


@pytest.mark.parametrize("op", [op for op in integration.OPS if op != "feature"])
def test_a_registered_attention_is_restored_with_its_options(op: str, tmp_path: Path) -> None:
    options = dict(
        nystrom=dict(num_landmarks=4, landmarks="grid", grid_size=(4, 4), prefix_tokens=1), performer=dict(num_features=8),
        linear=dict(feature_map="elu"), agent=dict(num_agents=4),
    )  # fmt: skip
    integration.register(retrain=True, **options)
    model = vit()
    softmax = run(model)
    model.set_attn_implementation(f"vix_{op}")
    assert not torch.equal(run(model), softmax)
    loaded = loads_like(model, tmp_path)
    assert loaded.config._attn_implementation.startswith(f"vix_{op}(")
    assert torch.equal(run(type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()), softmax)
    if op == "nystrom":  # a different operator of this library
        other = type(model).from_pretrained(tmp_path, attn_implementation="vix_performer")
        assert other.config._attn_implementation == "vix_performer" and not hasattr(other.config, "vix_attention")
        loaded.set_attn_implementation("vix_nystrom")  # the options of `register` again
        model.set_attn_implementation("vix_nystrom")
        assert torch.equal(run(loaded), run(model))


def test_models_with_different_options_do_not_share_a_name(tmp_path: Path) -> None:
    choices = [dict(num_landmarks=4), dict(num_landmarks=4, backend="reference"), dict(num_landmarks=4, dropout="ignore")]
    for index, options in enumerate([*choices, dict(num_landmarks=3)]):
        integration.register(nystrom=options)
        model = vit()
        model.set_attn_implementation("vix_nystrom")
        model.save_pretrained(tmp_path / str(index))
    integration.register()
    loaded = [transformers.AutoModel.from_pretrained(tmp_path / str(index)) for index in range(4)]
    assert [each.config._attn_implementation for each in loaded] == [
        "vix_nystrom(num_landmarks=4)",
        "vix_nystrom(num_landmarks=4) on reference",
        "vix_nystrom(num_landmarks=4, dropout='ignore')",
        "vix_nystrom(num_landmarks=3)",
    ]


def test_the_registered_name_is_restored_if_its_options_are_the_same(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    model.config._attn_implementation = "vix_nystrom"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(2, 9)[None]
    assert loaded.config._attn_implementation == "vix_nystrom" and torch.equal(loaded(ids)[0], model(ids)[0])


REPLACED = {
    "nystrom": dict(num_landmarks=4),
    "convolution": dict(num_landmarks=4, residual_conv_kernel=3),
    "feature": dict(num_features=8, seed=3),
    "performer": dict(num_features=8, dropout="ignore"),
    "agent": dict(exact_prefix=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_attention_is_restored_with_its_parameters(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = vit().to(dtype)
    op = "nystrom" if name == "convolution" else name
    integration.replace_attention(model, op, layers=["*.1.*"], retrain=True, **REPLACED[name])
    learned = [p for each in holders(model).values() for p in each.parameters()]
    for parameter in learned:
        nn.init.normal_(parameter)
    assert bool(learned) == (name in ("convolution", "feature"))
    if name == "feature":
        for each in holders(model).values():
            each.widen()
    loaded = loads_like(model, tmp_path)
    (before,), (after,) = holders(model).items(), holders(loaded).items()
    assert before[0] == after[0] and before[1].core == after[1].core and before[1].dropout == after[1].dropout
    assert [p.dtype for p in before[1].parameters()] == [p.dtype for p in after[1].parameters()]


@pytest.mark.parametrize("saved, loaded", [("head", "body"), ("body", "head")])
def test_a_part_of_a_model_is_restored(saved: str, loaded: str, tmp_path: Path) -> None:
    model = vit(saved)
    integration.replace_attention(model, "feature", retrain=True, num_features=8)
    model.save_pretrained(tmp_path)
    other = MODELS[loaded].from_pretrained(tmp_path).eval()
    bodies = [each.base_model if each is not each.base_model else each for each in (model, other)]
    assert len(holders(other)) == 2 and torch.equal(run(bodies[0]), run(bodies[1]))


@pytest.mark.parametrize("how", ["name", "layers"])
def test_one_part_of_a_model_with_several_parts_is_restored(how: str, tmp_path: Path) -> None:
    model = clip()
    softmax = run(model)
    if how == "name":
        integration.register(nystrom=dict(num_landmarks=4))
        model.set_attn_implementation({"vision_config": "vix_nystrom"})
    else:
        integration.replace_attention(model.vision_model, "nystrom", num_landmarks=4)
    assert not torch.equal(run(model), softmax)
    loaded = loads_like(model, tmp_path)
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(run(type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()), softmax)


def replaced(model: nn.Module, **options: object) -> nn.Module:
    integration.replace_attention(model, "performer", retrain=True, num_features=8, **options)
    return model


@pytest.mark.parametrize("layers", [None, ["*.1.*"]])
def test_all_models_from_one_configuration_have_the_attention(layers: list[str] | None, tmp_path: Path) -> None:
    """Build models from the configuration in `tmp_path`, from that of the loaded model, and from that of the original model."""
    model = replaced(vit("body"), layers=layers)
    model.save_pretrained(tmp_path)
    config, auto = transformers.ViTConfig.from_pretrained(tmp_path), transformers.AutoModel
    models = [transformers.ViTModel(config), transformers.ViTModel(config), auto.from_config(config), auto.from_config(config)]
    loaded = transformers.ViTModel.from_pretrained(tmp_path)
    models += [loaded, transformers.ViTModel(loaded.config), MODELS["head"](config).vit, transformers.ViTModel(model.config)]
    for each in models:
        each.eval().load_state_dict(model.state_dict(), strict=False)  # the head's body has no pooler
        assert torch.equal(run(each), run(model)) and holders(each).keys() == holders(model).keys()
    softmax = vit("body")
    for name in ("sdpa", "eager"):
        other = transformers.ViTModel.from_pretrained(tmp_path, attn_implementation=name).eval()
        second = transformers.ViTModel(other.config).eval()
        second.load_state_dict(other.state_dict())
        loaded.set_attn_implementation(name)
        for each in (other, second, loaded):
            torch.testing.assert_close(run(each), run(softmax))
        other.save_pretrained(tmp_path / name)
        assert "vix_attention" not in json.loads((tmp_path / name / "config.json").read_text())
        other.set_attn_implementation("vix")
        with pytest.raises(ValueError, match="expected a model with the layers in config.vix_attention, got ViTAttention"):
            run(other)


@pytest.mark.parametrize("how", ["name", "layers"])
def test_a_saved_configuration_describes_the_attention(how: str, tmp_path: Path) -> None:
    """The saved configurations of a CLIP model and of its vision model describe the attention layers.

    Configurations with softmax attention have no additional entries.
    """
    model = clip()
    if how == "name":
        integration.register(nystrom=dict(num_landmarks=4))
        model.set_attn_implementation({"vision_config": "vix_nystrom"})
    else:
        integration.replace_attention(model, "feature", retrain=True, num_features=8)
    expected, entries = run(model), [set(vars(each)) for each in (model.config, model.config.vision_config)]
    model.config.save_pretrained(tmp_path / "whole")
    model.config.vision_config.save_pretrained(tmp_path / "part")
    assert [set(vars(each)) for each in (model.config, model.config.vision_config)] == entries
    model.save_pretrained(tmp_path / "model")
    config, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "model"))
    assert config["attn_implementation"] == saved["attn_implementation"]
    assert config["vision_config"]["vix_attention"] == saved["vision_config"]["vix_attention"]
    integration.register()
    whole = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(tmp_path / "whole")).eval()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(run(whole), expected) and whole.config.text_config._attn_implementation == "sdpa"
    part = transformers.CLIPVisionModel(transformers.CLIPVisionConfig.from_pretrained(tmp_path / "part"))
    assert part.config._attn_implementation == whole.config.vision_config._attn_implementation
    assert len(holders(part)) == len(holders(whole)) == (0 if how == "name" else 2)
    model.set_attn_implementation("sdpa")
    model.config.save_pretrained(tmp_path / "softmax")
    text = (tmp_path / "softmax/config.json").read_text()
    assert "vix_attention" not in text and "attn_implementation" not in text


def test_layers_without_an_attention_raise() -> None:
    config = transformers.ViTConfig(**VISION, attn_implementation="vix")
    for model in (transformers.ViTModel(config), vit("body")):
        model.set_attn_implementation("vix")
        with pytest.raises(ValueError, match="config: expected a model with the layers .* call replace_attention, or pass"):
            run(model)
        replaced(model, layers=["*.1.*"])  # the other layer is deliberately not replaced
        run(model)


def test_a_snapshot_restores_the_configuration() -> None:
    model = vit("body")
    before, snapshot = set(vars(model.config)), Snapshot(model)
    replaced(model)
    snapshot.restore(["layers.0.attention"])
    assert list(holders(transformers.ViTModel(model.config))) == list(holders(model)) == ["layers.1.attention"]
    snapshot.restore(["layers.1.attention"])
    assert set(vars(model.config)) == before and model.config._attn_implementation == "sdpa"
    run(transformers.ViTModel(model.config))
    replaced(model)
    snapshot.restore()
    assert set(vars(model.config)) == before and model.config._attn_implementation == "sdpa"


def test_another_attention_of_this_library_overrides_the_layers(tmp_path: Path) -> None:
    integration.register(nystrom=dict(num_landmarks=4))
    replaced(vit("body")).save_pretrained(tmp_path / "layers")
    loaded = transformers.ViTModel.from_pretrained(tmp_path / "layers", attn_implementation="vix_nystrom").eval()
    model = vit("body")
    model.set_attn_implementation("vix_nystrom")
    assert torch.equal(run(loaded), run(model))
    model.save_pretrained(tmp_path / "name")
    with pytest.raises(ValueError, match="attn_implementation: expected 'vix_nystrom', .*, got 'vix', which requires"):
        transformers.ViTModel.from_pretrained(tmp_path / "name", attn_implementation="vix")


def test_layers_with_a_copied_configuration_are_refused(tmp_path: Path) -> None:
    """The decoder of ViTMAE has a copy of the configuration. save_pretrained does not save this copy."""
    decoder = {f"decoder_{name}": size for name, size in SIZES.items()}
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**VISION, **decoder)).eval()
    report = integration.replace_attention(model, "performer", retrain=True, num_features=8)
    assert len(report.replaced) == 2 and all(name.startswith("vit.") for name in report.replaced)
    assert list(report.refused) == [f"decoder.decoder_layers.{index}.attention" for index in range(2)]
    assert "its configuration is a copy" in report.refused["decoder.decoder_layers.0.attention"]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        outputs = [each(images, noise=noise).logits for each in (model, loaded, type(model).from_pretrained(tmp_path).eval())]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert len(holders(loaded)) == 2 == len(holders(transformers.ViTMAEModel.from_pretrained(tmp_path)))


def test_causal_layers_are_refused(tmp_path: Path) -> None:
    """The text layers of CLIP are causal because of their mask. Their attribute is_causal is False."""
    model = clip()
    report = integration.replace_attention(model, "nystrom", num_landmarks=4)
    assert len(report.replaced) == 2 and all(name.startswith("vision_model.") for name in report.replaced)
    refused = {name: reason for name, reason in report.refused.items() if name.startswith("text_model.")}
    assert len(refused) == 2 and set(refused.values()) == {"causal attention"}
    assert model.config.text_config._attn_implementation == "sdpa"
    loaded = loads_like(model, tmp_path)
    second = transformers.CLIPModel(loaded.config).eval()
    second.load_state_dict(loaded.state_dict())
    assert torch.equal(run(second), run(model))


def test_a_saved_model_loads_in_a_new_process(tmp_path: Path) -> None:
    """If the integration is not imported, an error names the attention implementation."""
    model = vit()
    integration.replace_attention(model, "feature", retrain=True, num_features=8)
    model.save_pretrained(tmp_path / "layers")
    named = vit()
    integration.register(retrain=True, performer=dict(num_features=8))
    named.set_attn_implementation("vix_performer")
    named.save_pretrained(tmp_path / "name")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.save((images, model(images).logits, named(images).logits), tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torchvision_operators as operators
declared = operators.mismatch() and operators.declare()
from transformers import AutoModelForImageClassification as Model
for name in ("layers", "name"):
    try:
        Model.from_pretrained(sys.argv[1] + "/" + name)
    except ValueError as error:
        assert 'attn_implementation="vix' in str(error), error
    else:
        raise AssertionError("expected an error")
import vix_kernels.integrations.transformers
images, *expected = torch.load(sys.argv[1] + "/expected.pt")
for name, logits in zip(("layers", "name"), expected):
    with torch.no_grad():
        assert torch.equal(Model.from_pretrained(sys.argv[1] + "/" + name).eval()(images).logits, logits), name
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


DAMAGED = {
    "list": ([], "vix_attention: expected a mapping, as save_pretrained writes it, got \\[\\]"),
    "empty": ({}, "vix_attention: expected an op and options, got {}"),
    "op": ({"op": "rwkv", "options": {}}, "vix_attention: op: expected one of 'agent', .*, got 'rwkv'"),
    "option": ({"op": "nystrom", "options": {"num_landmarks": -1}}, "vix_attention: num_landmarks: expected an integer >= 1"),
    "layers": ({"layers": 3}, "vix_attention: layers: expected a mapping, got 3"),
    "layer": ({"layers": {"layers.0.attention": 3}}, "vix_attention: expected an op and options, got 3"),
    "names": ({"layers": {"a": {}}}, "config: expected a model with the layers in config.vix_attention, got ViTAttention"),
}


@pytest.mark.parametrize("found, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_entries_are_named(found: object, message: str, tmp_path: Path) -> None:
    vit("body").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    name = "vix" if isinstance(found, dict) and "layers" in found else "vix_nystrom"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": name, "vix_attention": found}))
    with pytest.raises(ValueError, match=message):
        run(transformers.ViTModel.from_pretrained(tmp_path))


def test_other_models_are_saved_as_before(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    assert not {"attn_implementation", "vix_attention"} & set(json.loads((tmp_path / "config.json").read_text()))
    model = vit()
    model.set_attn_implementation("vix_nystrom")
    entries = set(vars(model.config))
    with pytest.raises(TypeError):
        model.save_pretrained(3)
    assert set(vars(model.config)) == entries
