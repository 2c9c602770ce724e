"""Shard folders that were changed after they were built."""

import hashlib
import json
from pathlib import Path

from pipeline.data.index import INDEX, ShardInfo, dataset_digest, load_index
from pipeline.data.sharding.summary import SUMMARY


def reseal(folder: Path) -> None:
    """An index that vouches for the tars as they are now; the summary may be left out."""
    (folder / SUMMARY).unlink(missing_ok=True)
    index, document = load_index(str(folder)), json.loads((folder / INDEX).read_text())
    shards = []
    for info in index.shards:
        data = (folder / info.name).read_bytes()
        shards.append(ShardInfo(info.name, len(data), hashlib.sha256(data).hexdigest(), info.samples))
    document["shards"] = [vars(shard) for shard in shards]
    document["digest"] = dataset_digest(index.categories, tuple(shards))
    (folder / INDEX).write_text(json.dumps(document))
