"""Time and memory of a training run before it starts: estimates, two measured steps, and numbers that are `auto`."""
