"""One pad group as tensors: padding, masks, packed targets, normalisation."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.batch import SIZES, batch
from support.data import noise_image

from pipeline.data.batch import MEAN, STD, Item, collate, pack, padded_shape

CPU = torch.device("cpu")


def test_collate_pads_right_and_bottom_with_mask() -> None:
    made = batch()
    assert made.images.shape == (3, 3, 64, 60)
    assert made.images.dtype == torch.uint8
    assert made.mask.shape == (3, 64, 60)
    assert made.mask.dtype == torch.bool
    for k, (height, width) in enumerate(SIZES):
        pixels = torch.from_numpy(np.array(noise_image((height, width), k))).permute(2, 0, 1)
        assert torch.equal(made.images[k, :, :height, :width], pixels)
        assert not made.mask[k, :height, :width].any()
        assert int(made.mask[k].sum()) == 64 * 60 - height * width
        assert not made.images[k][:, made.mask[k]].any()


def test_collate_targets_are_relative_to_each_image() -> None:
    made = batch()
    assert made.target_offsets.tolist() == [0, 2, 2, 3]
    assert made.labels.tolist() == [5, 6, 5]
    expected = [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.4, 0.65, 0.4, 0.5]]
    torch.testing.assert_close(made.boxes_cxcywh, torch.tensor(expected))
    assert [target["labels"].tolist() for target in made.targets] == [[5, 6], [], [5]]
    assert [tuple(target["boxes"].shape) for target in made.targets] == [(2, 4), (0, 4), (1, 4)]
    assert made.image_ids.tolist() == [100, 101, 102]
    assert made.sizes.tolist() == [[480, 640], [480, 641], [480, 642]]
    assert (made.group, made.weight, len(made)) == (3, 0.0, 3)
    kinds = (made.labels.dtype, made.target_offsets.dtype, made.image_ids.dtype, made.sizes.dtype)
    assert set(kinds) == {torch.int64}


def test_batch_to_normalises_with_zero_padding() -> None:
    made = batch().to(CPU)
    assert made.images.dtype == torch.float32
    assert not made.images[made.mask[:, None].expand_as(made.images)].any()
    pixels = torch.from_numpy(np.array(noise_image(SIZES[0], 0))).permute(2, 0, 1).float() / 255
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(made.images[0, :, :40, :60], expected)
    assert made.to(CPU).images is made.images, "moving twice does not normalise twice"


@pytest.mark.parametrize("count", [1, 3])
def test_collate_group_without_boxes(count: int) -> None:
    empty = Item(Image.new("RGB", (8, 6)), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 1, (6, 8))
    made = collate([empty] * count, 0, 1.0)
    assert made.boxes_cxcywh.shape == (0, 4)
    assert made.boxes_cxcywh.dtype == torch.float32
    assert made.labels.dtype == torch.int64
    assert made.target_offsets.tolist() == [0] * (count + 1)
    assert not made.mask.any()


def test_batch_copy_to_keeps_uint8() -> None:
    made = batch()
    copied = made.copy_to(CPU)
    assert copied.images.dtype == torch.uint8
    assert torch.equal(copied.to(CPU).images, made.to(CPU).images)


def test_pack_overwrites_old_pixels() -> None:
    items = [
        Item(noise_image(size, k), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), k, size)
        for k, size in enumerate(SIZES)
    ]
    images = np.full(padded_shape([item.extent for item in items]), 77, np.uint8)
    packed = pack(iter(items), images, 0, 1.0)
    assert packed.shape == images.shape == (3, 3, 64, 60)
    assert torch.equal(packed.batch(torch.from_numpy(images)).images, collate(items, 0, 1.0).images)


def test_pack_arrays_equal_images() -> None:
    boxes, labels = np.array([[1, 2, 3, 4]], np.float32), np.array([1])
    image = noise_image((20, 30), 0)
    array = np.asarray(image).transpose(2, 0, 1)
    a, b = (collate([Item(form, boxes, labels, 1, (40, 60))], 0, 1.0) for form in (image, array))
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.boxes_cxcywh, b.boxes_cxcywh)


def test_packed_pickles_without_tensors() -> None:
    items = [Item(noise_image((20, 30), 0), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 1, (20, 30))]
    packed = pack(items, np.zeros((1, 3, 20, 30), np.uint8), 2, 0.0)
    assert not any(isinstance(value, torch.Tensor) for value in vars(packed).values())
    assert len(pickle.dumps(packed)) < 1500
