"""Train ViX models in plain PyTorch. `vix train` is the command line."""

from .config import Config, UserError

__all__ = ["Config", "UserError"]
