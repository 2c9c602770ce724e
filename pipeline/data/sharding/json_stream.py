"""Reading the lists of a large JSON object one element at a time: memory follows one element, not the file.

Used by `annotations`, whose files are gigabytes of polygons that nobody keeps. The scanner is the standard library's,
which also reads NaN and Infinity, so that those are reported as numbers and not as broken JSON. A file that is no JSON
object is a ValueError with the place.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO

CHUNK = 2**22  # bytes read at a time
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_TOKEN = 16  # what ends this close to the end of the window may have been cut off there

_scan = json.JSONDecoder().raw_decode


class JsonLists:
    """Iterate over (key, element) for the lists under `wanted` keys, in the order of the file; the rest is skipped.

    After the iteration, `found` holds the wanted keys that are there and are lists, and `digest` the file's sha256.
    """

    def __init__(
        self, file: BinaryIO, wanted: Collection[str], tick: Callable[[int], None] = lambda size: None
    ) -> None:
        """`tick` is told how many bytes were read."""
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
                raise window.fault("a key is no string")
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
    """A stretch of the file as text, moved on as it is read."""

    def __init__(self, file: BinaryIO, tick: Callable[[int], None]) -> None:
        self.hash = hashlib.sha256()
        self._file, self._tick = file, tick
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is no space, or an empty string at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def expect(self, characters: str) -> str:
        """Step over the next character, which must be one of these."""
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
                if end + LONGEST_TOKEN < len(self._text) or self._ended:  # else a number may go on: `1` of `1.5e-3`
                    self._at = end
                    return value
            self._more()

    def fault(self, what: str, at: int | None = None) -> ValueError:
        """An error at a place in the window."""
        return ValueError(f"{what} at character {self._before + (self._at if at is None else at):,}")

    def _cut_off(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_TOKEN

    def _more(self) -> None:
        rest = len(self._text) - self._at
        data = self._file.read(max(CHUNK, rest))  # at least doubling, so that a huge element costs linear time
        self.hash.update(data)
        self._tick(len(data))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + self._decoder.decode(data, not data), 0
        self._ended = not data
