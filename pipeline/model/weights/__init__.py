"""Weights from outside: the published layouts, Hugging Face's names, files read without running what they contain."""

from pipeline.model.weights.published import export_official, load_official

__all__ = ["export_official", "load_official"]
