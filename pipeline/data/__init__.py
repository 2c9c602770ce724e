"""Reading shards: from an index and an order of samples to batches on the device."""
