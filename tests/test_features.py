"""Tests of intermediate features, of pooling, and of changes to a model after its creation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_models import images, one_of_each_family
from torch import Tensor, nn

from vix_kernels.integrations.zoo import replace_attention
from vix_kernels.models import create_model, load_model, save_model
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.testing.models import small_model

every_model = pytest.mark.parametrize("name", PUBLISHED)


def build(name: str, **overrides: object) -> nn.Module:
    """Return a model with several blocks or stages. Noise is added to the initial weights."""
    arguments = small_model(name, **overrides)
    if name.startswith("le"):
        arguments |= {"stages": 2, "embed_dim": (16, 24), "depth": (1, 2)}
    if name.startswith("cv"):
        arguments |= {"embed_dim": (16, 24), "depth": (1, 2)}
    torch.manual_seed(0)
    model = create_model(name, **arguments).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@every_model
def test_intermediates_are_the_outputs_of_the_levels(name: str) -> None:
    model, x, outputs = build(name), images(2, 3, 8, 8), {}
    for key, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, key=key: outputs.update({key: output}))
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert len(maps) == len(model.feature_info) == len(getattr(model, model.trunk))
    prefix = model.num_prefix_tokens
    for info, found in zip(model.feature_info, maps, strict=True):
        side = 8 // info["reduction"]
        assert found.shape == (2, info["num_chs"], side, side)
        assert torch.equal(found.flatten(2).mT, outputs[info["module"]][:, prefix:])

    last = model.forward_intermediates(x, [-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(last, features[:, prefix:])
    tokens = model.get_intermediate_layers(x, 1, return_prefix_tokens=True, norm=True)
    assert torch.equal(torch.cat(tokens[0][::-1], 1) if prefix else tokens[0], features)


@every_model
def test_stopping_early_and_pruning_keep_the_features(name: str) -> None:
    model, x = build(name), images(2, 3, 8, 8)
    logits, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    for index, expected in enumerate(maps):
        calls: list[int] = []
        handle = getattr(model, model.trunk)[-1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = model.forward_intermediates(x, [index], stop_early=True, intermediates_only=True)
        assert torch.equal(found[0], expected) and len(calls) == (index == len(maps) - 1)
        handle.remove()

        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([index - len(maps)], prune_norm=True) == [index]
        features = pruned.forward_features(x)
        assert torch.equal(features[:, model.num_prefix_tokens :], expected.flatten(2).mT)
        assert features.shape[-1] == pruned.head_hidden_size and torch.equal(pruned(x), features)
        features.sum().backward()
        assert all(parameter.grad is not None for parameter in pruned.parameters())
        pruned.reset_classifier(3, "max")
        assert pruned(x).shape == (2, 3)

    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(whole(x), logits)


@pytest.mark.parametrize("indices", [0, 5, [], [2], [-3], [0.5], "0"])
def test_indices_of_levels_are_checked(indices: object) -> None:
    with pytest.raises(ValueError, match="indices: expected a number of levels up to 2, or indices from -2 to 1, got"):
        build("vip").forward_intermediates(images(1, 3, 8, 8), indices)


def test_pruned_models_are_not_saved(tmp_path: Path) -> None:
    model = build("vip")
    model.prune_intermediate_layers([0])
    with pytest.raises(TypeError, match="model: expected a model from create_model .* that is not pruned"):
        save_model(model, tmp_path)
    with pytest.raises(ValueError, match="model: expected a model from create_model that is not pruned"):
        model.set_input_size(16)
    with pytest.raises(ValueError, match="prune_head: expected True, because the head needs the last stage"):
        build("levip").prune_intermediate_layers([0], prune_head=False)


@every_model
def test_pooling(name: str) -> None:
    model, x = build(name), images(2, 3, 8, 8)
    features = model.forward_features(x)
    patches = features[:, model.num_prefix_tokens :]
    for pool, expected in (("avg", patches.mean(1)), ("max", patches.amax(1)), ("", features)):
        model.reset_classifier(0, pool)
        assert torch.equal(model(x), expected)
        model.reset_classifier(4)
        assert model.global_pool == pool and model(x).shape == (*expected.shape[:-1], 4)
        assert not model.head.training
    assert create_model(name, **small_model(name), global_pool="").global_pool == ""


@pytest.mark.parametrize("position", ["learned", "rope_axial", "rope_mixed"])
@one_of_each_family
def test_the_input_size_changes_in_place(name: str, position: str, tmp_path: Path) -> None:
    """After `set_input_size`, the outputs equal those of the model that `load_model` builds for the same size."""
    model = build(name, **{"position": position} if name != "fnet_2d" else {})
    save_model(model, tmp_path)
    expected, x = load_model(tmp_path, img_size=(12, 8)), images(2, 3, 12, 8)
    kept = {key: p for key, p in model.named_parameters() if p.shape == dict(expected.named_parameters())[key].shape}
    model.requires_grad_(False)
    model.set_input_size((12, 8))
    assert torch.equal(model(x), expected(x))
    assert all(dict(model.named_parameters())[key] is parameter for key, parameter in kept.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [info["module"] for info in model.feature_info] == [info["module"] for info in expected.feature_info]
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), expected(x))


@pytest.mark.parametrize("mixer", ["linformer", "nystrom", "agent", "fourier", "feature"])
def test_the_input_size_changes_with_every_mixer(mixer: str, tmp_path: Path) -> None:
    options = {"num_landmarks": 4, "landmarks": "grid"} if mixer == "nystrom" else {}
    model = build("vit", mixer=mixer, **options)
    save_model(model, tmp_path)
    model.set_input_size(12)
    x = images(2, 3, 12, 12)
    assert torch.equal(model(x), load_model(tmp_path, img_size=12)(x))
    assert model.patch_embed.grid_size == (6, 6) and model.patch_embed.patch_size == (2, 2)


@pytest.mark.parametrize("name", ["vit", "vil", "levit"])
def test_a_size_with_the_same_number_of_tokens_is_resampled(name: str, tmp_path: Path) -> None:
    model = build(name, img_size=(8, 16))
    save_model(model, tmp_path)
    random = torch.get_rng_state()
    model.set_input_size((16, 8))
    assert torch.equal(torch.get_rng_state(), random)
    x = images(2, 3, 16, 8)
    assert torch.equal(model(x), load_model(tmp_path, img_size=(16, 8))(x))


@pytest.mark.parametrize("head", [nn.Linear(16, 7), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 7)), nn.Identity()])
def test_the_input_size_changes_with_any_head(head: nn.Module) -> None:
    model = build("vit")
    model.head = head
    model.set_input_size(12)
    assert model.head is head and model(images(2, 3, 12, 12)).shape == (2, 16 if isinstance(head, nn.Identity) else 7)


def test_a_changed_model_keeps_its_input_size(tmp_path: Path) -> None:
    model = build("vit", mixer="softmax", depth=2)
    hooked: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: hooked.append(output))
    model.set_input_size(12)
    model(images(1, 3, 12, 12))
    assert hooked[0].shape[1] == 37
    with pytest.raises(ValueError, match="patch_size: expected None"):
        model.set_input_size(8, patch_size=4)
    with pytest.raises(ValueError, match="img_size: expected multiples of patch_size"):
        model.set_input_size(9)
    replace_attention(model, "nystrom", num_landmarks=4)
    expected = model(images(1, 3, 12, 12))
    with pytest.raises(ValueError, match="expected the attention of create_model, but that of blocks.0.attn has been replaced"):
        model.set_input_size(8)
    with pytest.raises(ValueError, match="expected the attention of create_model"):
        save_model(model, tmp_path)
    assert torch.equal(model(images(1, 3, 12, 12)), expected) and not list(tmp_path.iterdir())
