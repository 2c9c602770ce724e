"""Writing shards: from COCO-format annotations and pictures to checked tars with an index."""
