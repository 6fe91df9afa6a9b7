"""Train Vision Xformers in plain PyTorch. The command line is `vix train`."""

from .config import Config, UserError

__all__ = ["Config", "UserError"]
