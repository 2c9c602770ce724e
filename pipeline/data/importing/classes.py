"""Which classes of a data set are used, and under which names: `--merge`, `--classes` and `--exclude`.

Merging comes first; the other two name classes as they are then. A merged class gets the id of the class that has the
new name, else the lowest id of its parts. A name that the data set lacks is a ConfigError with the nearest one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.suggest import nearest
from pipeline.data.importing.records import CocoEntry
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class ClassChoice:
    """What the flags ask for; all are empty if nothing is to change."""

    merge: tuple[tuple[tuple[str, ...], str], ...] = ()  # parts, new name
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.merge or self.only or self.exclude)


@dataclass(frozen=True)
class ClassMap:
    """The classes that remain, and what becomes of each id."""

    names: dict[int, str]
    ids: dict[int, int | None]  # None: its boxes are left out

    def apply(self, entries: Iterable[CocoEntry]) -> Iterator[CocoEntry]:
        """The entries of a COCO file with these classes; entries of unknown classes stay for the checks."""
        for number, name in self.names.items():
            yield "categories", {"id": number, "name": name}
        for kind, entry in entries:
            key = "id" if kind == "categories" else "category_id"
            own = entry.get(key) if isinstance(entry, dict) else None
            if kind == "images" or type(own) is not int or own not in self.ids:
                yield kind, entry
            elif kind == "annotations" and (new := self.ids[own]) is not None:
                yield kind, entry | {"category_id": new}


def parse_choice(merge: Sequence[str], only: str, exclude: str) -> ClassChoice:
    """The choice of command-line values: `a,b=c` each, `a,b`, `a,b`. Raises ConfigError."""
    merges = []
    for text in merge:
        parts, sign, new = text.partition("=")
        names = _names(parts)
        if not sign or not names or not new.strip():
            raise ConfigError(f"--merge takes a,b=c: classes a and b become class c; got {text!r}")
        merges.append((names, new.strip()))
    return ClassChoice(tuple(merges), _names(only), _names(exclude))


def map_classes(categories: Mapping[int, str], choice: ClassChoice) -> ClassMap:
    """The map of a data set's categories (names by id). Raises ConfigError."""
    names = dict(categories)
    ids: dict[int, int | None] = {key: key for key in names}
    for parts, new in choice.merge:
        _check_known("--merge", parts, names)
        merged = {key for key, name in names.items() if name in parts or name == new}
        target = min((key for key in merged if names[key] == new), default=min(merged))
        ids = {old: target if current in merged else current for old, current in ids.items()}
        names = {key: name for key, name in names.items() if key not in merged or key == target} | {target: new}
    _check_known("--classes", choice.only, names)
    _check_known("--exclude", choice.exclude, names)
    kept = {
        key: name
        for key, name in sorted(names.items())
        if (not choice.only or name in choice.only) and name not in choice.exclude
    }
    if not kept:
        raise ConfigError("--classes and --exclude leave no class")
    return ClassMap(kept, {old: current if current in kept else None for old, current in ids.items()})


def _check_known(flag: str, wanted: Sequence[str], names: Mapping[int, str]) -> None:
    for name in wanted:
        if name not in names.values():
            raise ConfigError(f"{flag}: there is no class {name!r}; did you mean {nearest(name, names.values())!r}?")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
