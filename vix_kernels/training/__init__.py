"""Train models from this library or timm without a training framework. The command is `vix train`."""

from .config import Config, UserError

__all__ = ["Config", "UserError"]
