"""Hyper-parameter search: a trial is the same training run that `jobs.train` starts."""
