"""Inference with a trained detector: pictures to boxes, and export as one graph for other runtimes."""
