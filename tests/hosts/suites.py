"""The test suites of host libraries, and the tests that are expected to fail, each with a reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Kind = Literal["causal", "attention dropout", "returned weights", "non-padding mask", "TorchScript"]


@dataclass(frozen=True)
class Expected:
    """Tests that are expected to fail.

    Attributes:
        pattern: an fnmatch pattern for test names, such as "tests.test_models::test_model_forward[1-vix_vin_tiny]".
            Brackets are literal.
        kind: the unsupported feature that the tests need.
        reason: why the feature is not supported, or how to avoid the failure.
    """

    pattern: str
    kind: Kind
    reason: str

    def covers(self, test: str) -> bool:
        return fnmatchcase(test, self.pattern.replace("[", "[[]"))


@dataclass(frozen=True)
class Suite:
    """Tests of a host library.

    Attributes:
        package: the host library.
        plugin: the pytest plugin that replaces the tested models, or their attention layers.
        files: test files, relative to the folder of the host library.
        settings: environment variables for the plugin.
        before: environment variables for a second run without this library, or None if the tested models are from this library.
        expected: the tests that are expected to fail.
    """

    package: str
    plugin: str
    files: tuple[str, ...]
    settings: dict[str, str]
    before: dict[str, str] | None = None
    expected: tuple[Expected, ...] = field(default=())


def modeling(*names: str) -> tuple[str, ...]:
    """Return the test files of the transformers models `names`."""
    return tuple(f"tests/models/{name}/test_modeling_{name}.py" for name in names)


ZOO = ("vit", "vil", "vip", "vin", "hybrid_vip", "fnet", "levin", "cvp", "ccn", "fnet_2d")
HOSTS = (
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "flexivit_small",
    "vit_small_patch16_rope_mixed_224", "vit_tiny_patch16_dinov3_qkvb", "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224", "mobilevit_xxs",
)  # fmt: skip
TORCHSCRIPT = "the operators choose between algorithms in Python, which torch.jit.script cannot compile; use torch.jit.trace"
DROPOUT = "the model has a dropout of 0.1 in the attention; register(nystrom=dict(dropout='ignore')) ignores it"
WEIGHTS = "linear-cost attention computes no attention weights"
WITHOUT_WEIGHTS = tuple(
    Expected(f"*::{test}", "attention dropout", DROPOUT)
    for test in (
        "test_training", "test_problem_types", "test_resize_tokens_embeddings",
        "test_enable_input_require_grads_with_gradient_checkpointing",
    )
) + tuple(
    Expected(f"*::{test}", "returned weights", WEIGHTS)
    for test in (
        "test_attention_outputs", "test_retain_grad_hidden_states_attentions", "test_capture_outputs_decorator",
        "test_model_outputs_equivalence",
    )
)  # fmt: skip
DIFFUSERS = (
    "tests/models/transformers/test_models_dit_transformer2d.py", "tests/models/unets/test_models_unet_2d.py",
    "tests/models/transformers/test_models_pixart_transformer2d.py",
)  # fmt: skip
SUITES = {
    "timm-models": Suite(
        "timm", "timm_plugin", ("tests/test_models.py",), {"VIX_MODELS": ",".join(f"vix_{name}_tiny" for name in ZOO)},
        expected=(Expected("*torchscript[*", "TorchScript", TORCHSCRIPT),),
    ),
    "timm-replaced": Suite(
        "timm", "timm_plugin", ("tests/test_models.py",), {"VIX_MODELS": ",".join(HOSTS), "VIX_REPLACE": "nystrom"},
        before={"VIX_MODELS": ",".join(HOSTS)}, expected=(Expected("*torchscript[*", "TorchScript", TORCHSCRIPT),),
    ),
    "transformers-vision": Suite(
        "transformers", "transformers_plugin", modeling("vit", "dinov2", "siglip"), {"VIX_ATTENTION": "vix_nystrom"}, before={},
        expected=WITHOUT_WEIGHTS,
    ),
    "diffusers-replaced": Suite(
        "diffusers", "diffusers_plugin", DIFFUSERS, {"VIX_REPLACE": "nystrom"}, before={},
    ),
    "transformers-patched": Suite(
        "transformers", "transformers_plugin", modeling("nystromformer", "fnet"), {"VIX_PATCH": "1"}, before={},
    ),
}  # fmt: skip
