"""Guards against a faulty step: NaN or infinity, weights that differ between ranks, a step that hangs."""
