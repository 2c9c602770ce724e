"""The guard: limits before the application works, lost requests passed on again, and every error as JSON."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.serving import guard
from pipeline.serving.guard import App, Guard, Message, Receive, Send

LIMITS: dict[str, Any] = {"max_bytes": 10, "timeout_s": 0.3, "max_in_flight": 2, "max_uploads": 2}
Client = Callable[[], Any]  # the next message of a client


def client(*pieces: bytes, then: str = "waits") -> Receive:
    """A client that sends pieces of a body, then waits for the answer, stalls in the body, or goes away."""
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if then == "waits":
        messages[-1]["more_body"] = False

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        if then == "goes":
            return {"type": "http.disconnect"}
        await asyncio.sleep(60)
        raise AssertionError

    return receive


def ask(
    app: App, receive: Receive, headers: dict[str, str] | None = None, path: str = "/v1/predict", **limits: Any
) -> tuple[int, Any] | None:
    """Status and JSON of the answer; None if there is none."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    encoded = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "method": "POST", "headers": encoded}
    asyncio.run(Guard(app, **{**LIMITS, **limits})(scope, receive, send))
    if not sent:
        return None
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], json.loads(sent[1]["body"])


async def reply(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    message = await receive()
    await reply(send, 200, json.dumps(message["body"].decode()).encode())


async def never(scope: Message, receive: Receive, send: Send) -> None:
    raise AssertionError("the application was called")


def code_of(answer: tuple[int, Any] | None) -> tuple[int, str]:
    assert answer is not None
    return answer[0], answer[1]["code"]


def test_guard_passes_the_whole_body_on() -> None:
    assert ask(echo, client(b"abc", b"", b"defghij")) == (200, "abcdefghij")


def test_guard_large_body_is_refused_by_its_length_or_while_it_comes() -> None:
    assert code_of(ask(never, client(b""), {"Content-Length": "11"})) == (413, "too_large")
    assert code_of(ask(never, client(b"abcdef", b"ghijkl"))) == (413, "too_large")


@pytest.mark.parametrize("length", ["-1", "ten", "9" * 5000])
def test_guard_wrong_length_is_refused(length: str) -> None:
    assert code_of(ask(never, client(b""), {"Content-Length": length})) == (400, "bad_request")


def test_guard_slow_upload_is_refused_in_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "UPLOAD_SHARE", 0.01)
    start = time.monotonic()
    assert code_of(ask(never, client(b"abc", then="stalls"), timeout_s=30.0)) == (408, "upload_too_slow")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("path", sorted(guard.WITHOUT_TOKEN))
@pytest.mark.parametrize("headers", [{"Content-Length": "3"}, {"Transfer-Encoding": "chunked"}], ids=str)
def test_guard_body_for_an_address_that_needs_no_token_is_refused_unread(path: str, headers: dict[str, str]) -> None:
    """Else whoever has no token could fill the places of uploads."""

    async def unread() -> Message:
        raise AssertionError

    answer = ask(never, unread, headers, path, token_sha256=guard.token_digest("the token of the server"))
    assert code_of(answer) == (400, "bad_request")


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "0"}], ids=str)
def test_guard_request_without_a_body_for_an_address_that_needs_no_token_is_answered(headers: dict[str, str]) -> None:
    answer = ask(echo, client(b""), headers, "/readyz", token_sha256=guard.token_digest("the token of the server"))
    assert answer == (200, "")


def test_guard_client_that_goes_gets_nothing_and_calls_nothing() -> None:
    assert ask(never, client(b"abc", then="goes")) is None


def test_guard_lost_request_is_passed_on_again() -> None:
    calls: list[bytes] = []

    async def dies_twice(scope: Message, receive: Receive, send: Send) -> None:
        calls.append((await receive())["body"])
        if len(calls) == 3:
            await reply(send, 200, b"1")

    assert ask(dies_twice, client(b"abc"), attempts=3) == (200, 1)
    assert calls == [b"abc"] * 3
    assert code_of(ask(dies_twice, client(b"abc"), attempts=3)) == (503, "unavailable")


def test_guard_request_of_a_client_that_has_gone_is_not_passed_on_again() -> None:
    calls: list[str] = []

    async def waits(scope: Message, receive: Receive, send: Send) -> None:
        calls.append((await receive())["type"])
        calls.append((await receive())["type"])

    receive = client(b"abc")

    async def goes_later() -> Message:
        return {"type": "http.disconnect"} if calls else await receive()

    assert ask(waits, goes_later, attempts=3) is None
    assert calls == ["http.request", "http.disconnect"]


@pytest.mark.parametrize("status", [400, 404, 408, 429, 500, 503])
def test_guard_error_in_plain_text_becomes_json(status: int) -> None:
    async def plain(scope: Message, receive: Receive, send: Send) -> None:
        await reply(send, status, b"Traceback in /a/b.py", b"text/plain")

    answer = ask(plain, client(b""))
    assert answer is not None
    assert answer[0] == (503 if status in (404, 408) else status), "Ray Serve's 404 says that nothing is served"
    assert answer[1].keys() == {"code", "message"}
    assert "Traceback" not in answer[1]["message"]


def test_guard_exception_becomes_json_also_after_a_plain_error() -> None:
    async def fails(scope: Message, receive: Receive, send: Send) -> None:
        raise RuntimeError("in /a/b.py")

    async def fails_late(scope: Message, receive: Receive, send: Send) -> None:
        await reply(send, 500, b"text", b"text/plain")
        raise RuntimeError("in /a/b.py")

    assert code_of(ask(fails, client(b""))) == (500, "internal")
    assert code_of(ask(fails_late, client(b""))) == (500, "internal")


@pytest.mark.parametrize("swallows", [False, True])
def test_guard_slow_application_is_cut_off_also_if_it_swallows_the_cancellation(swallows: bool) -> None:
    async def slow(scope: Message, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if not swallows:
                raise

    assert code_of(ask(slow, client(b""), attempts=3)) == (503, "timed_out")
