"""What one rank does: the loop, its checkpoints, how it stops early."""
