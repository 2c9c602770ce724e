"""Bodies of requests as a careless or hostile client sends them: drawn from a seed, so that a fault can be repeated."""

import base64
import io
import json
import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from PIL import Image

from support.serving import image_file

JSON = "application/json"
FORM = "multipart/form-data; boundary=frontier"


@dataclass(frozen=True)
class Body:
    """A request's body."""

    what: str
    kind: str  # the header Content-Type
    content: bytes


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of chunks (name, data), with right checksums."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(name + data))]
    return b"".join(parts)


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    """The chunk IHDR of a PNG file."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


@cache
def packed_zeros(mebibytes: int) -> bytes:
    """Zeros as zlib packs them, a thousandth of their size."""
    return zlib.compress(bytes(mebibytes * 2**20), 9)


def png_bomb(draw: random.Random) -> bytes:
    """Few bytes that unpack to many: of pixels, of a text, of a colour profile; or that promise many."""
    zeros = packed_zeros(draw.choice([1, 8, 40]))
    end = (b"IEND", b"")
    side = draw.choice([1, 100, 4000, 30_000, 2**31 - 1])
    return draw.choice(
        [
            png_of(header(side, side), (b"IDAT", zeros), end),
            png_of(header(8, 8), (b"IDAT", zeros), end),
            png_of(header(8, 8), (b"zTXt", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(200))), end),
            png_of(header(8, 8), (b"iCCP", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(200))), end),
            png_of(header(8, 8), (b"IDAT", zlib.compress(bytes(200))), (b"iTXt", b"a\0\1\0\0\0" + zeros), end),
            png_of(header(side, 1, 16), (b"IDAT", zeros[: draw.randrange(len(zeros))]), end),
        ]
    )


def damaged(draw: random.Random) -> bytes:
    """An image file that was cut, or some of whose bytes were changed."""
    size = (draw.randrange(1, 80), draw.randrange(1, 80))
    file = bytearray(image_file(size, draw.choice(["JPEG", "PNG"]), draw.randrange(1000)))
    if draw.random() < 0.4:
        return bytes(file[: draw.randrange(len(file))])
    for _ in range(draw.randrange(1, 20)):
        file[draw.randrange(len(file))] = draw.randrange(256)
    return bytes(file)


def other_format(draw: random.Random) -> bytes:
    """A whole image of a format, or of a kind of pixels, that few send."""
    mode, kind = draw.choice(
        [("RGB", "GIF"), ("RGB", "BMP"), ("RGB", "TIFF"), ("I;16", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")]
    )
    buffer = io.BytesIO()
    Image.new(mode, (draw.randrange(1, 40), draw.randrange(1, 40))).save(buffer, kind)
    return buffer.getvalue()


def huge_header(draw: random.Random) -> bytes:
    """A JPEG file whose header promises more than there is, or goes on for long."""
    size = struct.pack(">HH", draw.choice([1, 65_535]), draw.choice([1, 65_535]))
    segment = b"\xff\xe1\xff\xff" + bytes(draw.randrange(65_533))
    frame = b"\xff\xc0\0\x11\x08" + size + b"\3\1\x22\0\2\x11\1\3\x11\1"
    return b"\xff\xd8" + segment * draw.randrange(8) + frame + bytes(draw.randrange(100))


def nested_json(draw: random.Random) -> bytes:
    """JSON of great depth or width."""
    depth = draw.choice([10, 1000, 100_000])
    opened = draw.choice([b"[", b'{"image":', b'{"a":['])
    return opened * depth + draw.choice([b"", b"1" + b"]" * depth])


def wrong_field(draw: random.Random) -> bytes:
    """A JSON object whose fields have other types, names or ranges."""
    values = [None, True, -1, 1e308, 10**400, "", "x" * 5000, [], {}, "\ud800", "é", "../../etc/passwd", "YWJj"]
    names = ["image", "threshold", "top_k", "exif", "other", "", "\0", "__proto__"]
    fields = {draw.choice(names): draw.choice(values) for _ in range(draw.randrange(1, 6))}
    return json.dumps(fields).encode()


def form(draw: random.Random, content: bytes) -> bytes:
    """A form with the content as its image, often a broken one."""
    name = draw.choice(["image", "image", "image", "file", "", 'ima"ge', "image\r\nX: y"])
    file = draw.choice(["", '; filename="a.jpg"', '; filename="../../a"', "; filename*=utf-8''a"])
    encoding = draw.choice(["", "", "\r\nContent-Transfer-Encoding: base64", "\r\nContent-Transfer-Encoding: odd"])
    head = f'--frontier\r\nContent-Disposition: form-data; name="{name}"{file}{encoding}\r\n\r\n'.encode()
    count, value = draw.choice([(0, b""), (1, b"0.5"), (1, b"nan"), (2, b"x" * 9999), (2000, b"1")])
    field = b'\r\n--frontier\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n' + value
    fields = field * count
    whole = head + content + fields + b"\r\n--frontier--\r\n"
    return draw.choice([whole, whole, whole[: draw.randrange(len(whole))], whole.replace(b"\r\n", b"\n")])


LEAKS = re.compile(
    r"Traceback|File \\?\"|\.py\b|/(?:home|root|tmp|usr|work|opt)/|object at 0x|site-packages", re.IGNORECASE
)

Post = Callable[[Body], Any]  # the answer
IMAGES: tuple[Callable[[random.Random], bytes], ...] = (png_bomb, damaged, other_format, huge_header)


def draw_bodies(count: int, seed: int = 0) -> Iterator[Body]:
    """Bodies of every kind.

    Args:
        count: their number.
        seed: equal seeds give equal bodies.
    """
    draw = random.Random(seed)
    for number in range(count):
        make = IMAGES[number % len(IMAGES)]
        image = make(draw)
        shape = number // len(IMAGES) % 4
        if shape == 0:
            text = base64.b64encode(image).decode()
            cut = draw.choice([text, text, text[:-1], text + "!", f"data:image/png;base64,{text}"])
            yield Body(make.__name__, JSON, json.dumps({"image": cut}).encode())
        elif shape == 1:
            yield Body(make.__name__, FORM, form(draw, image))
        elif shape == 2:
            other = draw.choice([nested_json, wrong_field])
            whole = other(draw)
            yield Body(other.__name__, JSON, draw.choice([whole, whole[: draw.randrange(len(whole))]]))
        else:
            kind = draw.choice(
                [
                    JSON,
                    FORM,
                    "multipart/form-data",
                    "text/plain",
                    "",
                    "image/png",
                    "application/json; charset=utf-16",
                    '\xff;;="',
                ]
            )
            yield Body("wrong type", kind, draw.choice([image, draw.randbytes(draw.randrange(2000)), b""]))


def check_answers(post: Post, bodies: Iterable[Body], clients: int = 1) -> Counter[str]:
    """Send bodies and check the answers; how often each code came.

    Args:
        post: sends a body; by several threads if there are several clients.
        bodies: to send.
        clients: requests at a time.
    """
    codes: Counter[str] = Counter()
    sent = iter(bodies)
    with ThreadPoolExecutor(clients) as pool:
        while some := list(islice(sent, 8 * clients)):
            for body, answer in zip(some, pool.map(post, some), strict=True):
                request = (
                    f"{body.what}, {body.kind!r}, {len(body.content)} bytes: {answer.status_code} {answer.text[:300]}"
                )
                content = json.loads(answer.text)
                if answer.status_code == 200:
                    codes["200"] += 1
                    continue
                assert 400 <= answer.status_code < 500, request
                assert content.keys() == {"code", "message"}, request
                assert not LEAKS.search(answer.text), request
                assert len(answer.text) < 300, request
                codes[content["code"]] += 1
    return codes
