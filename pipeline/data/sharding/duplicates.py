"""Finds images that are in two splits: copies byte by byte, and near duplicates such as re-encoded or resized ones.

Near duplicates agree in the difference hash (64 bits: is a pixel of a 9 x 8 thumbnail brighter than its left neighbour)
and in the correlation of their 18 x 16 thumbnails. Among 200 images of COCO no two
different ones come near the limits, while copies at JPEG quality 50, in gray, 15% brighter or squeezed to 416 x 416 are
found. The package imagehash computes the same hash in the same ten lines, with PyWavelets as a dependency and without
the second test, which images with a plain ground need. Nothing is raised: duplicates are findings.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import decode, to_rgb
from pipeline.data.sharding.rules import Findings, Rule

WIDTH, HEIGHT = 18, 16  # of a thumbnail; twice the grid of the hash
MAX_BITS = 10  # of 64 that may differ; different images of COCO differ in 12 or more
MIN_CORRELATION = 0.95  # different images of COCO reach 0.89
ROWS = 64  # compared at a time: 60 MB for the images of COCO


@dataclass(frozen=True)
class Fingerprint:
    """What an image is recognised by."""

    digest: bytes  # sha256 of its bytes
    thumbnail: NDArray[np.uint8]  # gray [HEIGHT, WIDTH]


def fingerprint(data: bytes, stored: bytes, image: Image.Image) -> Fingerprint:
    """The fingerprint of an image file.

    Args:
        data: the file's bytes.
        stored: the bytes that a shard holds, which differ for converted images.
        image: what they decode to, at any scale.

    Raises:
        ShardError: the image does not decode.
    """
    if min(image.size) < 2 * WIDTH:  # a small JPEG at 1/8 scale has lost what makes it alike
        image = decode(stored)
    thumbnail = np.asarray(to_rgb(image).convert("L").resize((WIDTH, HEIGHT), Image.Resampling.BOX))
    return Fingerprint(hashlib.sha256(data).digest(), thumbnail)


def find_duplicates(splits: Mapping[str, Sequence[tuple[str, Fingerprint]]], findings: Findings) -> None:
    """Add a finding for each image that is, or nearly is, in an earlier split too.

    Args:
        splits: file names and fingerprints by the name of the split, in order.
        findings: this function adds to them.
    """
    earlier: list[tuple[str, Fingerprint]] = []
    for images in splits.values():
        known = {seen.digest: name for name, seen in reversed(earlier)}
        copies = [(name, known[seen.digest]) for name, seen in images if seen.digest in known]
        findings.add_all(Rule.EXACT_DUPLICATE, copies, _describe)
        others = [(name, seen) for name, seen in images if seen.digest not in known]
        near = _nearest([seen for _, seen in others], [seen for _, seen in earlier])
        pairs = [(others[own][0], earlier[other][0]) for own, other in near]
        findings.add_all(Rule.NEAR_DUPLICATE, pairs, _describe)
        earlier += images


def _nearest(images: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """(position, position of its nearest near duplicate) of the images that have one among the others."""
    found: list[tuple[int, int]] = []
    if not images or not others:
        return found
    own, other = (np.stack([one.thumbnail for one in ones]).astype(np.float32) for ones in (images, others))
    own_bits, other_bits = _hashes(own), _hashes(other)
    own, other = _standardised(own), _standardised(other)
    for start in range(0, len(own), ROWS):
        distances = np.bitwise_count(own_bits[start : start + ROWS, None] ^ other_bits[None])
        for row, columns in _by_row(np.argwhere(distances <= MAX_BITS)):
            alike = other[columns] @ own[start + row]
            best = int(np.argmax(alike))
            if alike[best] >= MIN_CORRELATION:
                found.append((start + row, int(columns[best])))
    return found


def _by_row(positions: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    rows, first = np.unique(positions[:, 0], return_index=True)
    return list(zip(rows.tolist(), np.split(positions[:, 1], first[1:]), strict=False))


def _hashes(thumbnails: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The difference hash of each thumbnail [n, HEIGHT, WIDTH]."""
    grid = thumbnails.reshape(-1, HEIGHT // 2, 2, WIDTH // 2, 2).mean(axis=(2, 4))
    bits = (grid[:, :, 1:] > grid[:, :, :-1]).reshape(len(grid), -1)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _standardised(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each thumbnail as a vector of mean 0 and length 1, so that a product is a correlation; 0 if it has one value."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    standardised: NDArray[np.float32] = flat / np.maximum(length, 1e-6)
    return standardised


def _describe(pair: tuple[str, str]) -> str:
    return f"{pair[0]} and {pair[1]}"
