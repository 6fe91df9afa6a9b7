"""Training of the ViX models in plain PyTorch; `vix train` is its command line."""

from .config import Config, UserError

__all__ = ["Config", "UserError"]
