"""An ASGI middleware before the application: token, limits of bytes, time and requests, and errors as JSON.

A body is read completely before anything else works on the request, and until then the request counts among the uploads
alone. So a slow client occupies no replica and no place of a request that waits for one, and a request that a dying
replica lost can be sent to another one. If as many bodies arrive as may, one that is slow gives way to the next. The
same class stands before Ray Serve's proxy, see `proxy`, and before each replica. Every fault becomes an answer; nothing
is raised but a cancellation.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from pipeline.logs import get_logger
from pipeline.serving.refusals import (
    RefusedError,
    busy,
    gave_way,
    internal,
    of_status,
    timed_out,
    too_large,
    unauthorized,
    unavailable,
    upload_too_slow,
    without_body,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
ALIVE = "/healthz"
UPLOAD_SHARE = 0.5  # of the time of a request, in which its body must arrive; the model has the rest
SLOW_RATE = 16 * 2**10  # bytes per second; a body that is slower gives way
FAIR_SECONDS = 2.0  # before which a body is not called slow
# The page holds nothing of the model; probes carry no token. `/-/` are the addresses of Ray Serve's proxy.
WITHOUT_TOKEN = ("/", ALIVE, "/readyz", "/-/healthz")

log = get_logger("serving")


def token_digest(token: str) -> str:
    """SHA-256 of a token: what processes pass on instead of it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Guard:
    """The middleware.

    Attributes:
        in_flight: requests whose body is there and whose answer is not.
    """

    def __init__(
        self,
        app: App,
        *,
        max_bytes: int,
        timeout_s: float,
        max_in_flight: int,
        max_uploads: int,
        token_sha256: str = "",
        attempts: int = 1,
    ) -> None:
        """Guard an application.

        Args:
            app: the application.
            max_bytes: of a body.
            timeout_s: from the start of a request to its answer; the body must arrive in `UPLOAD_SHARE` of it.
            max_in_flight: requests at a time whose bodies are there; more are refused.
            max_uploads: bodies that arrive at a time; one more takes the place of a slow one, or is refused.
            token_sha256: `token_digest` of the token; empty lets everybody in.
            attempts: how often a request is passed on if no answer comes.
        """
        self._app = app
        self._max_bytes, self._timeout, self._max_in_flight = max_bytes, timeout_s, max_in_flight
        self._max_uploads, self._uploads = max_uploads, set[_Upload]()
        self._token, self._attempts = token_sha256, attempts
        self.in_flight = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            self._admit(scope)
        except RefusedError as refusal:
            await answer.refuse(refusal)
            return
        if scope["path"] == ALIVE:  # also if every replica is busy
            await answer.give(200, {"status": "alive"})
            return
        deadline = time.monotonic() + self._timeout
        try:
            body = await self._upload(receive)
            if body is not None:
                await self._serve(scope, _Replay(body, receive), answer, deadline)
        except RefusedError as refusal:
            await answer.refuse(refusal)
        except Exception:
            log.exception("a request to %s failed", scope["path"])
            await answer.refuse(internal())

    def _admit(self, scope: Message) -> None:
        headers = dict(scope["headers"])
        if self._token and scope["path"] not in WITHOUT_TOKEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            digest = hashlib.sha256(given.strip()).hexdigest()
            if not hmac.compare_digest(digest, self._token) or scheme.lower() != b"bearer":
                raise unauthorized()
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 19:
            raise RefusedError(400, "bad_request", "Content-Length is not a number")
        if int(length) > self._max_bytes:
            raise too_large(self._max_bytes)
        if scope["path"] in WITHOUT_TOKEN and (int(length) or b"transfer-encoding" in headers):
            raise without_body()  # else whoever has no token could fill the places of uploads
        if self.in_flight >= self._max_in_flight and scope["path"] != ALIVE:  # before its body is read
            raise busy()

    async def _upload(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone."""
        if len(self._uploads) >= self._max_uploads and not self._end_slowest():
            raise busy()
        seconds = UPLOAD_SHARE * self._timeout
        upload = _Upload(time.monotonic(), asyncio.timeout(seconds))
        self._uploads.add(upload)
        try:
            async with upload.timer:
                return await self._read(receive, upload)
        except TimeoutError:
            raise gave_way() if upload not in self._uploads else upload_too_slow(seconds) from None
        finally:
            self._uploads.discard(upload)

    def _end_slowest(self) -> bool:
        """End the slowest upload if it is slow; whether there is a place now."""
        now = time.monotonic()
        old = [upload for upload in self._uploads if now - upload.since > FAIR_SECONDS]
        slowest = min(old, key=lambda upload: upload.rate(now), default=None)
        if slowest is None or slowest.rate(now) >= SLOW_RATE:
            return False
        self._uploads.discard(slowest)
        if not slowest.timer.expired():
            slowest.timer.reschedule(asyncio.get_running_loop().time())
        return True

    async def _serve(self, scope: Message, replay: "_Replay", answer: "_Answer", deadline: float) -> None:
        """Pass a request on whose body is there."""
        if self.in_flight >= self._max_in_flight:
            raise busy()
        self.in_flight += 1
        try:
            await self._pass_on(scope, replay, answer, deadline)
        finally:
            self.in_flight -= 1

    async def _pass_on(self, scope: Message, replay: "_Replay", answer: "_Answer", deadline: float) -> None:
        for _ in range(self._attempts):
            timer = asyncio.timeout(deadline - time.monotonic())
            try:
                async with timer:
                    await self._app(dict(scope), replay.start(), answer.send)
            except TimeoutError:
                if not timer.expired():
                    raise
            if timer.expired():  # Ray Serve's proxy swallows the cancellation
                raise timed_out(self._timeout)
            if answer.started or replay.client_has_gone:
                await answer.finish()
                return
        raise unavailable()

    async def _read(self, receive: Receive, upload: "_Upload") -> bytes | None:
        chunks = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            upload.size += len(chunks[-1])
            if upload.size > self._max_bytes:
                raise too_large(self._max_bytes)
            if not message.get("more_body", False):
                return b"".join(chunks)


@dataclass(eq=False)
class _Upload:
    """A body that arrives."""

    since: float  # monotonic seconds
    timer: asyncio.Timeout
    size: int = 0  # bytes so far

    def rate(self, now: float) -> float:
        """Bytes per second."""
        return self.size / (now - self.since)


class _Answer:
    """The messages of an answer on their way to the client; an error that is not JSON is replaced."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._replaced: RefusedError | None = None
        self.started = False

    async def send(self, message: Message) -> None:
        """Pass a message of the application on."""
        if message["type"] == "http.response.start":
            self.started = True
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] >= 400 and not kind.startswith(b"application/json"):
                # Ray Serve's proxy answers so without an application: before its start and while it ends.
                self._replaced = unavailable() if message["status"] == 404 else of_status(message["status"])
        if self._replaced is None:
            await self._send(message)

    async def finish(self) -> None:
        """Send what stands for a replaced error."""
        if self._replaced is not None:
            await self._give(self._replaced)

    async def refuse(self, refusal: RefusedError) -> None:
        """Answer with a refusal, unless another answer has begun."""
        if not self.started or self._replaced is not None:
            await self._give(refusal)

    async def give(self, status: int, content: dict[str, str], headers: dict[str, str] | None = None) -> None:
        """Answer with JSON."""
        body = json.dumps(content).encode()
        named = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        encoded = [(name.lower().encode(), value.encode()) for name, value in named.items()]
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body})

    async def _give(self, refusal: RefusedError) -> None:
        self._replaced = None
        await self.give(refusal.status, refusal.content(), refusal.headers)


class _Replay:
    """`receive` of a request whose body has been read, as often as it is passed on."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body, self._receive = body, receive
        self.client_has_gone = False

    def start(self) -> Receive:
        """From the beginning of the body."""
        left = [self._body]

        async def receive() -> Message:
            if left:
                return {"type": "http.request", "body": left.pop(), "more_body": False}
            message = await self._receive()
            self.client_has_gone = message["type"] == "http.disconnect"
            return message

        return receive
