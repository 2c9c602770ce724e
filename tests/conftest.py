"""Shared by all tests: keep Ray, MLflow and the threads of two cores quiet."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
