"""Push models to the Hugging Face Hub, and load models from the Hub.

Requires huggingface_hub, which the extra `hub` installs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn

from .pretrained import load_model, save_model


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="vix_kernels", tags=["image-classification"]):
    """A model that can be pushed to and loaded from the Hub.

        HubModel(model).push_to_hub("me/my-model")
        model = HubModel.from_pretrained("me/my-model", num_classes=5).model

    The repository contains the files that `save_model` writes. `from_pretrained` passes additional keyword arguments to
    `load_model`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.model, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **overrides: Any,
    ) -> HubModel:
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, token=token,
            )  # fmt: skip
        return cls(load_model(folder, **overrides))
