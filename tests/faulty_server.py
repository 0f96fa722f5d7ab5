"""A file server on a loopback port that misbehaves as told: what it is asked and what it sends is on record."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


@dataclass
class Fault:
    """How one GET of a path is answered.

    Attributes:
        status: instead of 200 or 206, with an empty body.
        headers: sent besides, or instead of the usual ones (None leaves one out; a function is asked at that moment).
        hold: an event that is waited for before the body is sent.
        drop_after: body bytes after which the connection is closed.
        stall_after: body bytes after which nothing more is sent for `stall` seconds.
        ignore_range, ignore_if_range: answer as if the header were not there.
        range_shift: serve another range, of the length asked for, so many bytes behind; the header says so.
        content: another body, of the length that it has.
    """

    status: int | None = None
    headers: dict[str, str | Callable[[], str] | None] = field(default_factory=dict)
    hold: threading.Event | None = None
    drop_after: int | None = None
    stall_after: int | None = None
    stall: float = 5.0
    ignore_range: bool = False
    ignore_if_range: bool = False
    range_shift: int = 0
    content: bytes | None = None


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    body_bytes: int = 0
    time: float = 0.0


class FaultyServer:
    """Use as a context manager.

    Attributes:
        files: path (without the leading slash) -> bytes.
        faults: path -> what happens to its GETs, one after another; then it is served as it should be.
        always: path -> what happens to every one of its GETs.
        requests: all requests, in order.
        max_simultaneous: most requests that were being answered at one time.
        delay: seconds before every 16 KiB of a body.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.max_simultaneous = 0
        self.delay = 0.0
        self._simultaneous = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments) -> None:
                pass

            def do_GET(self) -> None:
                with server._lock:
                    self.has_left = False
                    server._simultaneous += 1
                    server.max_simultaneous = max(server.max_simultaneous, server._simultaneous)
                try:
                    server.answer(self)
                except OSError:  # the client has gone
                    self.close_connection = True
                finally:
                    self.leave()

            def leave(self) -> None:
                """Before the last byte goes out, after which the client may ask for more: counted once."""
                with server._lock:
                    server._simultaneous -= not self.has_left
                    self.has_left = True

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self, suffix: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(suffix)]

    def body_bytes(self, suffix: str = "") -> int:
        return sum(request.body_bytes for request in self.gets(suffix))

    def answer(self, handler) -> None:
        path = unquote(urlparse(handler.path).path).lstrip("/")
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        request = Request(handler.command, path, wanted, condition, time=time.monotonic())
        with self._lock:
            self.requests.append(request)
            waiting = self.faults.get(path)
            fault = waiting.pop(0) if waiting and handler.command == "GET" else self.always.get(path, Fault())
        content = self.files.get(path) if fault.content is None else fault.content
        status, headers, body = 404, {}, b""
        if content is not None:
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            status, headers, body = 200, {"ETag": etag}, content
            if wanted and not fault.ignore_range and (fault.ignore_if_range or condition in (None, etag)):
                first = int(wanted.removeprefix("bytes=").rstrip("-"))
                if first >= len(content):
                    status, headers, body = 416, {"Content-Range": f"bytes */{len(content)}"}, b""
                else:
                    first, end = first + fault.range_shift, len(content) + fault.range_shift
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                    status, body = 206, content[first:end]
        if fault.status is not None:
            status, headers, body = fault.status, {}, b""
        request.status = status
        sent = {"Content-Length": str(len(body)), **headers, **fault.headers}
        handler.send_response(status)
        for name, value in sent.items():
            if value is not None:
                handler.send_header(name, value() if callable(value) else value)
        if sent["Content-Length"] is None:
            handler.send_header("Connection", "close")
        if not body or handler.command == "HEAD":
            handler.leave()
        handler.end_headers()
        if handler.command == "GET":
            self.send(handler, fault, body, request)

    def send(self, handler, fault: Fault, body: bytes, request: Request) -> None:
        stops = [len(body) if stop is None else min(stop, len(body)) for stop in (fault.drop_after, fault.stall_after)]
        end = min(stops)
        if fault.hold is not None:
            fault.hold.wait(120)
        for start in range(0, end, 16384):
            if self.delay:
                self.closing.wait(self.delay)
            piece = body[start : min(start + 16384, end)]
            if start + len(piece) == end:
                handler.leave()
            handler.wfile.write(piece)
            request.body_bytes += len(piece)
        if fault.stall_after is not None:
            self.closing.wait(fault.stall)
        # A length that is not the body's: the client waits for the rest, or takes it for the next answer.
        if end < len(body) or fault.headers.get("Content-Length", "") != "":
            handler.close_connection = True
