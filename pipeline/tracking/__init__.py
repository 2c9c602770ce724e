"""MLflow's runs: which store counts, the connection, metrics and files, what its pages show."""
