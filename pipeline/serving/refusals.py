"""Answers that are no detections: a status, a code for programs and a sentence for people, as JSON.

They hold what the client sent or may know, never a path, a trace or a text of a library.
"""

from collections.abc import Mapping

from pipeline.errors import PipelineError


class RefusedError(PipelineError):
    """A request that is not answered with detections."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, code, message, headers)  # all of them, so that a pickle has them
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def __str__(self) -> str:
        return self.message

    def content(self) -> dict[str, str]:
        """What the client gets as JSON."""
        return {"code": self.code, "message": self.message}


SOON = {"Retry-After": "1"}  # seconds
CLOSE = {"Connection": "close"}  # else a client that goes on with its body would keep its connection


def unauthorized() -> RefusedError:
    """No token, or another one."""
    text = "this server needs its token, as the header Authorization: Bearer TOKEN"
    return RefusedError(401, "unauthorized", text, {"WWW-Authenticate": "Bearer"})


def too_large(max_bytes: int) -> RefusedError:
    """A body of more bytes than the limit."""
    return RefusedError(413, "too_large", f"the request has more than {max_bytes:,} bytes; scale the image down")


def without_body() -> RefusedError:
    """A body for an address that reads none."""
    return RefusedError(400, "bad_request", "this address takes no body; send the request without one", CLOSE)


def busy() -> RefusedError:
    """Too many requests wait."""
    return RefusedError(429, "busy", "too many requests are waiting; try again later", SOON)


def upload_too_slow(seconds: float) -> RefusedError:
    """The body did not arrive in time."""
    return RefusedError(
        408, "upload_too_slow", f"the request did not arrive within {seconds:g} s; scale the image down", CLOSE
    )


def gave_way() -> RefusedError:
    """The body arrived slowly while others waited for its place."""
    text = "the request arrived so slowly that another one took its place; try again later"
    return RefusedError(408, "upload_too_slow", text, {**CLOSE, **SOON})


def timed_out(seconds: float) -> RefusedError:
    """The answer was not there in time."""
    return RefusedError(503, "timed_out", f"there was no answer within {seconds:g} s; try again later", SOON)


def unavailable() -> RefusedError:
    """No replica answers."""
    return RefusedError(503, "unavailable", "no replica of the model answers now; try again later", SOON)


def internal() -> RefusedError:
    """A fault of the server, which its log describes."""
    return RefusedError(500, "internal", "the server has a fault; its log says more")


def of_status(status: int) -> RefusedError:
    """The refusal for a status that another part of the server gave, whose text is not passed on."""
    known = {
        401: unauthorized(),
        404: RefusedError(404, "not_found", "there is nothing at this address; /openapi.json lists what there is"),
        405: RefusedError(405, "method_not_allowed", "this address does not take this method; see /openapi.json"),
        408: RefusedError(503, "timed_out", "there was no answer in time; try again later", SOON),
        429: busy(),
        503: unavailable(),
    }
    if status in known:
        return known[status]
    return internal() if status >= 500 else RefusedError(status, "bad_request", "the request is not valid HTTP")
