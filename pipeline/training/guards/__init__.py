"""What ends or skips a step that went wrong: NaN, weights that differ between ranks, a step that hangs."""
