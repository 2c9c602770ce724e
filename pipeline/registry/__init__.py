"""MLflow's registered models: from a run to a version, from a name to a checkpoint; weights in and out."""
