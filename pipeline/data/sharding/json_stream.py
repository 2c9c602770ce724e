"""Reads the lists of a large JSON object one element at a time: memory depends on the largest element, not the file.

Annotation files hold gigabytes of polygons that are not kept. The scanner is the standard library's. It also reads NaN
and Infinity, so these are reported as numbers and not as broken JSON. A file that is not a JSON object raises a
ValueError with the position.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

READ_BYTES = 2**22  # per read
SPACE = re.compile(r"[ \t\r\n]*")
MAX_VALUE_CHARACTERS = 2**28  # of one element; a crowd mask has thousands
MAX_TOKEN_CHARACTERS = 16  # a value that ends this close to the end of the window may be incomplete

_scan = json.JSONDecoder().raw_decode


class Readable(Protocol):
    """What is read: an open file, or another stream of bytes."""

    def read(self, count: int, /) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        ...


class JsonLists:
    """Iterate over (key, element) for the lists under `wanted` keys, in the order of the file; other keys are skipped.

    After the iteration, `found` holds the wanted keys that exist and are lists, and `digest` is the file's sha256.
    """

    def __init__(
        self, file: Readable, wanted: Collection[str], tick: Callable[[int], None] = lambda size: None
    ) -> None:
        """`tick` is called with the number of bytes of each read."""
        self.found: set[str] = set()
        self._wanted = wanted
        self._window = _Window(file, tick)

    @property
    def digest(self) -> str:
        """sha256 of what was read."""
        return self._window.hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Raises ValueError: not JSON, not an object, or a wanted key twice."""
        window = self._window
        window.expect("{")
        while window.peek() != "}":
            key = window.value()
            if not isinstance(key, str):
                raise window.fault("a key is not a string")
            window.expect(":")
            yield from self._elements(key)
            if window.expect(",}") == "}":
                break
            if window.peek() == "}":
                raise window.fault("a comma without a next key")
        else:
            window.expect("}")
        if window.peek():
            raise window.fault("something follows the object")

    def _elements(self, key: str) -> Iterator[tuple[str, Any]]:
        window, wanted = self._window, key in self._wanted
        if window.peek() != "[":
            window.value()
            return
        if wanted and key in self.found:
            raise window.fault(f"a second list of {key}")
        if wanted:
            self.found.add(key)
        window.expect("[")
        if window.peek() == "]":
            window.expect("]")
            return
        while True:
            element = window.value()
            if wanted:
                yield key, element
            if window.expect(",]") == "]":
                return


class _Window:
    """A moving window of the file's text."""

    def __init__(self, file: Readable, tick: Callable[[int], None]) -> None:
        self.hash = hashlib.sha256()
        self._file, self._tick = file, tick
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is not a space, or an empty string at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it also matches the empty string
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def expect(self, characters: str) -> str:
        """Skip the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            raise self.fault(f"expected {' or '.join(characters)}, found {found or 'the end'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = _scan(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._cut_off(error):
                    raise self.fault(error.msg, error.pos) from None
            else:
                if end + MAX_TOKEN_CHARACTERS < len(self._text) or self._ended:  # else it may continue: `1.5`
                    self._at = end
                    return value
            self._more()

    def fault(self, what: str, at: int | None = None) -> ValueError:
        """A ValueError with a position in the file."""
        return ValueError(f"{what} at character {self._before + (self._at if at is None else at):,}")

    def _cut_off(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - MAX_TOKEN_CHARACTERS

    def _more(self) -> None:
        rest = len(self._text) - self._at
        if rest > MAX_VALUE_CHARACTERS:
            raise self.fault(f"an element has more than {MAX_VALUE_CHARACTERS:,} characters")
        data = self._file.read(max(READ_BYTES, rest))  # at least doubling, so that a huge element costs linear time
        self.hash.update(data)
        self._tick(len(data))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + self._decoder.decode(data, not data), 0
        self._ended = not data
