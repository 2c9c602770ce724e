"""From COCO-format annotations to batches: index, shards, plan, dataset, transforms, loader."""
