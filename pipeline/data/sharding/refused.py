"""Records refused entries and the ids they refer to, so that their consequences are not listed as further findings."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LARGEST = 2**63 - 1


@dataclass
class Refused:
    """Ids, in the form of `id_key`, of refused entries and of the images and categories of refused annotations."""

    images: set[str] = field(default_factory=set)  # refused image entries
    categories: set[str] = field(default_factory=set)  # refused category entries
    named_images: set[str] = field(default_factory=set)  # by refused annotations
    named_categories: set[str] = field(default_factory=set)  # by refused annotations
    files: set[str] = field(default_factory=set)  # last parts of the file names of refused image entries

    def add_image(self, entry: Any) -> None:
        """Record an image entry that is not used."""
        if isinstance(entry, dict):
            self.images.add(id_key(entry.get("id")))
            if isinstance(name := entry.get("file_name"), str):
                self.files.add(PurePosixPath(name.replace("\\", "/")).name)

    def add_category(self, entry: Any) -> None:
        """Record a category entry that is not used."""
        if isinstance(entry, dict):
            self.categories.add(id_key(entry.get("id")))

    def add_annotation(self, entry: Any) -> None:
        """Record an annotation that is not used."""
        if isinstance(entry, dict):
            self.named_images.add(id_key(entry.get("image_id")))
            self.named_categories.add(id_key(entry.get("category_id")))


def id_key(value: Any) -> str:
    """An id as text: equal for 7, 7.0 and "7", which some tools mix."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value).strip()


def whole_ids(keys: set[str]) -> list[int]:
    """The keys that are integers of 64 bits, ascending."""
    numbers = (int(key) for key in keys if key.isascii() and key.isdigit() and len(key) <= 19)
    return sorted(number for number in numbers if number <= LARGEST)
