"""The library behind `jobs/` and `tune/`: data, model, engine, evaluation, tracking, registry.

Importing it is free: no torch, no Ray, no CUDA.
"""

__version__ = "0.2.0"
