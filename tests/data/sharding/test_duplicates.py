"""Duplicates in two splits: copies, re-encoded and resized ones are found, different images are not."""

import io
from collections.abc import Callable

import pytest
from PIL import Image, ImageEnhance
from support.data import noise_image

from pipeline.data.images import check_decodes, open_image
from pipeline.data.sharding.duplicates import Fingerprint, find_duplicates, fingerprint
from pipeline.data.sharding.rules import Findings, Rule

SIZE = (300, 400)


def encode(image: Image.Image, kind: str = "JPEG", **options: int) -> Fingerprint:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = buffer.getvalue()
    size = open_image(data).size
    return fingerprint(data, data, check_decodes(data, (size[1], size[0])))


def found(**splits: list[Fingerprint]) -> dict[Rule, list[str]]:
    findings = Findings()
    named = {split: [(f"{split}{k}", one) for k, one in enumerate(prints)] for split, prints in splits.items()}
    find_duplicates(named, findings)
    return {rule: examples for rule, _, examples in findings}


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encode(image, quality=50),
        lambda image: encode(image, "PNG"),
        lambda image: encode(image.resize((208, 208))),
        lambda image: encode(image.convert("L")),
        lambda image: encode(ImageEnhance.Brightness(image).enhance(1.15)),
        lambda image: encode(image.crop((4, 4, 400, 300))),
    ],
    ids=["quality", "PNG", "size", "gray", "brighter", "cropped"],
)
def test_changed_copy_is_a_near_duplicate(change: Callable[[Image.Image], Fingerprint]) -> None:
    images = [noise_image(SIZE, seed) for seed in range(20)]
    train = [encode(image) for image in images]
    assert found(train=train, val=[change(images[7])]) == {Rule.NEAR_DUPLICATE: ["val0 and train7"]}


def test_equal_bytes_are_one_finding_and_splits_are_compared_with_all_before() -> None:
    one, other, third = (encode(noise_image(SIZE, seed)) for seed in (1, 2, 3))
    assert found(train=[one, one], val=[other], test=[one, other, third]) == {
        Rule.EXACT_DUPLICATE: ["test0 and train0", "test1 and val0"]
    }


def test_different_images_are_none() -> None:
    prints = [encode(noise_image(SIZE, seed)) for seed in range(300)]
    assert found(train=prints[:200], val=prints[200:250], test=prints[250:]) == {}


def test_plain_ground_with_different_objects_is_none() -> None:
    plain = []
    for k in range(12):
        image = Image.new("RGB", (400, 300), "white")
        image.paste((200, 30, 60), (20 + 90 * (k % 4), 20 + 90 * (k // 4), 60 + 90 * (k % 4), 60 + 90 * (k // 4)))
        plain.append(encode(image))
    assert found(train=plain[:6], val=plain[6:]) == {}


def test_empty_split_and_single_colours_are_allowed() -> None:
    black, white = (encode(Image.new("RGB", (40, 30), colour)) for colour in ("black", "white"))
    assert found(train=[], val=[black]) == {}
    assert found(train=[black], val=[white]) == {}


@pytest.mark.parametrize("size", [(50, 70), (140, 180), (300, 400)])
def test_lossless_copy_of_a_jpeg_of_any_size_is_a_near_duplicate(size: tuple[int, int]) -> None:
    images = [noise_image(size, seed) for seed in range(10)]
    copies = [encode(Image.open(io.BytesIO(jpeg_of(image))), "PNG") for image in images]
    assert len(found(train=[encode(image) for image in images], val=copies)[Rule.NEAR_DUPLICATE]) == 5  # those shown


def jpeg_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()
