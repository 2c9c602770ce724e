"""A pad group is a function of its request and the shards; what its memory held before does not show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.data import write_shards

from pipeline.data.batch import Batch
from pipeline.data.dataset import DetectionDataset
from pipeline.data.group import Request, make_group
from pipeline.data.transforms import View
from pipeline.errors import ShardError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return DetectionDataset(write_shards(tmp_path_factory.mktemp("group"), images=4).folder)


def group(data: DetectionDataset, fused: bool, fill: int) -> Batch:
    request = Request(0, (2, 0), (View(False, data.size(2)), View(True, data.size(0))), fused, 5, 0.5)
    images = np.full(request.shape, fill, np.uint8)
    return make_group(request, [data], images).batch(torch.from_numpy(images))


@pytest.mark.parametrize("fused", [False, True])
def test_make_group_holds_its_samples_in_order_whatever_the_memory_held(data: DetectionDataset, fused: bool) -> None:
    made, other = group(data, fused, 0), group(data, fused, 255)
    assert torch.equal(made.images, other.images)
    assert (made.group, made.weight, made.image_ids.tolist()) == (5, 0.5, [17, 3])
    assert made.sizes.tolist() == [list(data.size(i)) for i in (2, 0)]
    for row, (i, flip) in enumerate(((2, False), (0, True))):
        sample = data.sample(i)
        shown = np.asarray(sample.image)[:, :: -1 if flip else 1].transpose(2, 0, 1)
        height, width = data.size(i)
        assert torch.equal(made.images[row, :, :height, :width], torch.from_numpy(shown.copy()))
        assert made.mask[row].sum() == made.mask[row].numel() - height * width
        targets = made.boxes_cxcywh[made.target_offsets[row] : made.target_offsets[row + 1]]
        left, right = sample.boxes_xyxy[:, 0] / width, sample.boxes_xyxy[:, 2] / width
        centres = (left + right) / 2
        np.testing.assert_allclose(targets[:, 0], 1 - centres if flip else centres, atol=1e-6)


def test_make_group_of_a_damaged_shard_raises(data: DetectionDataset, tmp_path: Path) -> None:
    damaged = DetectionDataset(write_shards(tmp_path, images=4).folder)
    shard = Path(damaged.index.folder) / damaged.index.shards[0].name
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ShardError, match=str(shard)):
        group(damaged, False, 0)
