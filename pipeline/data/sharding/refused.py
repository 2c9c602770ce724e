"""What a refused entry takes with it, so that its consequences are not listed as findings of their own."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LARGEST = 2**63 - 1


@dataclass
class Refused:
    """Ids as `id_key` writes them, of refused entries and of what refused annotations point to."""

    images: set[str] = field(default_factory=set)  # refused image entries
    categories: set[str] = field(default_factory=set)  # refused category entries
    named_images: set[str] = field(default_factory=set)  # by refused annotations
    named_categories: set[str] = field(default_factory=set)  # by refused annotations
    files: set[str] = field(default_factory=set)  # last parts of the file names of refused image entries

    def add_image(self, entry: Any) -> None:
        """An image entry that is not used."""
        if isinstance(entry, dict):
            self.images.add(id_key(entry.get("id")))
            if isinstance(name := entry.get("file_name"), str):
                self.files.add(PurePosixPath(name.replace("\\", "/")).name)

    def add_category(self, entry: Any) -> None:
        """A category entry that is not used."""
        if isinstance(entry, dict):
            self.categories.add(id_key(entry.get("id")))

    def add_annotation(self, entry: Any) -> None:
        """An annotation that is not used."""
        if isinstance(entry, dict):
            self.named_images.add(id_key(entry.get("image_id")))
            self.named_categories.add(id_key(entry.get("category_id")))


def id_key(value: Any) -> str:
    """An id as text, the same for 7, 7.0 and "7", which writers of annotations mix."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value).strip()


def whole_ids(keys: set[str]) -> list[int]:
    """Those keys that are whole numbers of 64 bits, ascending."""
    numbers = (int(key) for key in keys if key.isascii() and key.isdigit() and len(key) <= 19)
    return sorted(number for number in numbers if number <= LARGEST)
