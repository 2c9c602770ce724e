"""Monitoring of training steps: means, step files, profiler, slow ranks, Ray's dashboard."""
