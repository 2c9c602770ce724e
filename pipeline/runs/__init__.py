"""What is written about a run in its folder: run.json and evaluations.json."""
