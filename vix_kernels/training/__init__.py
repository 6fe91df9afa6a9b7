"""Train the models of this library and of timm without a training framework. The command line is `vix train`."""

from .config import Config, UserError

__all__ = ["Config", "UserError"]
