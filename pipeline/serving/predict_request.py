"""The body of a request for detections, JSON or a form, becomes an image and the limits of its detections.

Everything is refused before it is costly: unknown fields before the image is decoded, its pixels before they are
computed. All faults are Refusals.
"""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationError
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pipeline.config.base import Section
from pipeline.config.serving import ServingConfig
from pipeline.data.batch import Item
from pipeline.data.images import MAGIC, open_image
from pipeline.errors import InputError, ShardError
from pipeline.evaluation.drawing import THRESHOLD, TOP_K
from pipeline.inference.base64_text import decode_base64
from pipeline.inference.predictor import Limits, read_image
from pipeline.logs import get_logger
from pipeline.serving.refusals import RefusedError

JSON, FORM = "application/json", "multipart/form-data"
MAX_TOP_K = 1000
FIELD_BYTES = 1000  # of a form's field other than the image
PIECE = 64 * 2**10  # bytes that the parser of forms gets at a time

log = get_logger("serving")


class Options(Section):
    """Which detections are wanted."""

    threshold: float = Field(THRESHOLD, ge=0, le=1)
    """Detections with a lower score are left out."""

    top_k: int = Field(TOP_K, ge=1, le=MAX_TOP_K)
    """Largest number of detections."""

    exif: Literal["apply", "ignore"] = "apply"
    """Whether the image is turned by its EXIF orientation; boxes are in pixels of the turned image."""


class PredictJson(Options):
    """A request as JSON."""

    image: str = Field(min_length=1)
    """A JPEG or PNG file in base64, also as a data URL."""


def read_request(
    kind: str, body: bytes, settings: ServingConfig, prepare: Callable[[Any], Item]
) -> tuple[Item, Limits]:
    """The image of a request as the model takes it, and its limits. Takes processor time: not for an event loop.

    Args:
        kind: the header Content-Type.
        body: the whole body.
        settings: limits.
        prepare: `Predictor.prepare`.

    Raises:
        RefusedError: the request is not valid.
    """
    media, parameters = parse_options_header(kind)
    if media == JSON.encode():
        data, options = _read_json(body)
    elif media == FORM.encode():
        data, options = _read_form(body, parameters.get(b"boundary", b""), settings.max_bytes)
    else:
        raise RefusedError(415, "unsupported_media_type", f"send {JSON} or {FORM}")
    image = decode_image(data, options.exif, settings.max_pixels)
    return prepare(image), Limits(options.threshold, options.top_k)


def decode_image(data: bytes, exif: Literal["apply", "ignore"], max_pixels: int) -> Any:
    """The image of a file as RGB.

    Raises:
        RefusedError: neither JPEG nor PNG, too many pixels, or a file that does not decode.
    """
    if not data.startswith(tuple(MAGIC)):
        raise RefusedError(422, "not_an_image", "the image is neither JPEG nor PNG; its first bytes say so")
    try:
        width, height = open_image(data).size
    except ShardError as error:
        if "pixels" in str(error):
            raise too_many_pixels(max_pixels) from None
        raise RefusedError(422, "broken_image", "the image has a broken header") from None
    if width * height > max_pixels:
        raise too_many_pixels(max_pixels)
    try:
        return read_image(data, exif)
    except InputError:
        pass
    except Exception:  # hostile files reach rare faults of Pillow
        log.warning("an image does not decode", exc_info=True)
    raise RefusedError(422, "broken_image", "the image does not decode; is the file complete?")


def too_many_pixels(max_pixels: int) -> RefusedError:
    """An image of more pixels than the limit."""
    return RefusedError(413, "too_many_pixels", f"the image has more than {max_pixels:,} pixels; scale it down")


def _read_json(body: bytes) -> tuple[bytes, Options]:
    try:
        request = PredictJson.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _refuse_fields(error) from None
    data = decode_base64(request.image)
    if data is None:
        raise RefusedError(422, "not_base64", "the field image is not base64")
    return data, request


def _read_form(body: bytes, boundary: bytes, max_bytes: int) -> tuple[bytes, Options]:
    fields: dict[str, bytes] = {}
    ended: list[bool] = []

    def add(name: bytes | None, value: bytes) -> None:
        key = (name or b"").decode("utf-8", "replace")
        if key in fields or key not in ("image", *Options.model_fields):
            raise RefusedError(422, "invalid_field", f"{key[:40]!r} is twice in the form, or is no field of it")
        fields[key] = value

    def add_file(file: Any) -> None:
        file.file_object.seek(0)
        add(file.field_name, file.file_object.read())
        file.close()

    limits = {"MAX_FIELDS": 8, "MAX_FIELD_SIZE": max_bytes, "MAX_MEMORY_FILE_SIZE": 2 * max_bytes}
    try:
        if not boundary:
            raise FormParserError("no boundary")
        parser = FormParser(
            FORM,
            lambda field: add(field.field_name, field.value or b""),
            add_file,
            on_end=lambda: ended.append(True),
            boundary=boundary,
            config={**limits, "UPLOAD_ERROR_ON_BAD_CTE": True},
        )
        for start in range(0, len(body), PIECE):
            parser.write(body[start : start + PIECE])
        parser.finalize()
    except (ValueError, KeyError, AttributeError, AssertionError):  # of the parser, whose errors are ValueErrors
        raise RefusedError(400, "bad_form", "the form does not parse; is its boundary right?") from None
    if not ended:
        raise RefusedError(400, "bad_form", "the form has no end")
    if not fields.get("image"):
        raise RefusedError(422, "invalid_field", "image: the form has no file in this field")
    data = fields.pop("image")
    if any(len(value) > FIELD_BYTES for value in fields.values()):
        raise RefusedError(422, "invalid_field", f"a field has more than {FIELD_BYTES} bytes")
    try:
        return data, Options.model_validate({key: value.decode("utf-8", "replace") for key, value in fields.items()})
    except ValidationError as error:
        raise _refuse_fields(error) from None


def _refuse_fields(error: ValidationError) -> RefusedError:
    """Name the first fault; the value, which may be long, is not repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RefusedError(400, "bad_json", "the body is not valid JSON")
    name = ".".join(str(part) for part in first["loc"])[:40] or "the body"
    return RefusedError(422, "invalid_field", f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}")
