"""Inference with a trained detector: images to boxes, and export as one graph for other runtimes."""
