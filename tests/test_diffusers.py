"""Tests of the diffusers integration on a diffusion transformer and on U-Nets."""

import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from vix_kernels.integrations import diffusers as integration  # noqa: E402


def dit():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return model.eval(), (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]))


def test_with_all_landmarks_a_diffusion_transformer_keeps_its_outputs():
    model, inputs = dit()
    expected = model(*inputs).sample
    assert expected.abs().max() > 0.1
    report = integration.replace_attention(model, "nystrom", num_landmarks=16, pinv_iterations=16)
    assert report.replaced == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"] and not report.refused
    out = model(*inputs).sample
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    out.square().sum().backward()
    assert model.transformer_blocks[0].attn1.to_q.weight.grad.any()


@pytest.mark.parametrize("op", ["nystrom", "performer"])
def test_a_saved_model_gives_the_same_outputs(op, tmp_path):
    """diffusers does not save the replacement, so the attention layers are replaced again after loading."""
    model, inputs = dit()
    integration.replace_attention(model, op, retrain=True)
    model.save_pretrained(tmp_path)
    # The weights in the file are not aligned. On some CPUs, matrix products with them are rounded differently, so copy them.
    again = copy.deepcopy(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)).eval()
    assert not torch.equal(again(*inputs).sample, model(*inputs).sample)
    integration.replace_attention(again, op, retrain=True)
    assert torch.equal(again(*inputs).sample, model(*inputs).sample)


def test_compiles_as_one_graph():
    model, inputs = dit()
    integration.replace_attention(model, "performer", retrain=True)
    expected = model(*inputs).sample
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*inputs).sample, expected)
    seeds = [block.attn1.vix.core.seed for block in model.transformer_blocks]
    assert seeds == [0, 1]


def test_a_unet_with_text_keeps_its_outputs():
    """Some attention layers take feature maps, apply a group norm and add a residual. Cross-attention is not replaced."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ).eval()  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12)
    expected = model(*inputs).sample
    report = integration.replace_attention(model, "nystrom", num_landmarks=64, pinv_iterations=16)
    assert any("attn1" in name for name in report.replaced) and any("attentions.0" in name for name in report.replaced)
    assert report.refused and set(report.refused.values()) == {"cross-attention"}
    torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("error")
def test_a_unet_without_text_keeps_its_outputs():
    """The middle block passes the time embedding to its attention layer as an additional argument.

    The processor must accept this argument, because diffusers drops arguments that the processor does not accept.
    """
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3])
    expected = model(*inputs).sample
    report = integration.replace_attention(model, "nystrom", num_landmarks=64, pinv_iterations=16)
    assert "mid_block.attentions.0" in report.replaced
    torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-3, rtol=1e-3)


def test_an_attention_without_scaling_is_not_replaced():
    attention = diffusers.models.attention_processor.Attention(32, heads=2, dim_head=16, scale_qk=False)
    with pytest.raises(ValueError, match="a processor of class AttnProcessor"):
        integration.replace_attention(torch.nn.Sequential(attention), "nystrom")


def test_unsupported_arguments_raise():
    model, _ = dit()
    integration.replace_attention(model, "nystrom")
    attention, x = model.transformer_blocks[0].attn1, torch.randn(1, 16, 16)
    with pytest.raises(NotImplementedError, match="encoder_hidden_states: expected None"):
        attention(x, encoder_hidden_states=x)
    with pytest.raises(NotImplementedError, match="attn_mask: expected one row"):
        attention(x, attention_mask=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="retrain"):
        integration.replace_attention(model, "linear")
    with pytest.raises(ValueError, match="got a model without any attention"):
        integration.replace_attention(torch.nn.Linear(2, 2), "nystrom")
