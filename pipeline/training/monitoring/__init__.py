"""What watches the steps: means, step files, profiler, slow ranks, Ray's dashboard."""
