"""The trials of a sweep in Ray Tune: starting them, watching them, and what they leave on disk."""
