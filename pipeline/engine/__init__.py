"""One optimizer step over pad groups: losses, accumulation, DeepSpeed ZeRO, AdamW, precision."""
