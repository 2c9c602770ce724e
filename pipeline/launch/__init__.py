"""The run as a whole, at the driver: checks before the start, the cluster, restarts, how the run ended."""
