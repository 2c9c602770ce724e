"""Bytes from base64 in the forms that clients send. Never fails; text that is not base64 is None."""

import base64
import binascii
from urllib.parse import unquote


def decode_base64(text: str) -> bytes | None:
    """The bytes of standard or URL-safe base64, with or without line breaks, padding or a data URL; else None."""
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            return None
        text = unquote(text)
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None
