"""Convert trained models with softmax attention to linear-cost attention."""

from ..integrations.linearized import load_linearized, save_linearized
from .convert import linearize
from .report import LayerReport, Report

__all__ = ["LayerReport", "Report", "linearize", "load_linearized", "save_linearized"]
