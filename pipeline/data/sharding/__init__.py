"""Writing shards: from COCO-format annotations and images to checked tars with an index."""
