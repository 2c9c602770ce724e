"""The detectors that the paper compares with and that are not set predictors."""
