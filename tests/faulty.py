"""An HTTP server that misbehaves: `serve(folder, faults)`, as conftest.py offers it to tests; of a folder, or standing
before another server.

Each request to a path takes the next of its faults, in order; when they are used up the server behaves. Deterministic,
and it supports ranges, so that tests can tell a connection that was taken up again from one that began anew.
"""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server:
    """What a test sees of it."""

    def __init__(self, source: Path | str, faults: Callable[[str], Sequence[str]]) -> None:
        self.source, self.faults = source, faults
        self.taken: dict[str, int] = defaultdict(int)
        self.requests: list[tuple[str, str, str]] = []  # (path, Range, fault)
        self.lock = threading.Lock()
        self.url = ""

    def count(self, name: str) -> int:
        """Requests for a file."""
        return sum(path == name for path, _, _ in self.requests)

    def next_fault(self, path: str, range_: str) -> str:
        with self.lock:
            plan, n = self.faults(path), self.taken[path]
            self.taken[path] += 1
            fault = plan[n] if n < len(plan) else ""
            self.requests.append((path, range_, fault))
            return fault


@contextlib.contextmanager
def serve(source: Path | str, faults: Callable[[str], Sequence[str]] = lambda path: ()) -> Iterator[Server]:
    """Serves a folder, or what the server at a URL has, on a port of loopback.

    faults: (path) -> the faults of the first requests for it (before another server: that read).
    """
    server = Server(source, faults)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if isinstance(source, str):
                pass_on(self, server, source)
            else:
                answer(self, server, source)

        def do_other(self) -> None:
            assert isinstance(source, str)
            pass_on(self, server, source)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_other  # noqa: N815 (http.server's names)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        server.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


def answer(handler: BaseHTTPRequestHandler, server: Server, folder: Path) -> None:
    path, range_ = unquote(urlsplit(handler.path).path).lstrip("/"), handler.headers.get("Range", "")
    fault = server.next_fault(path, range_)
    try:
        data = (folder / path).read_bytes()
    except OSError:
        handler.send_error(int(fault) if fault.isdigit() else 404)
        return
    start = int(range_.removeprefix("bytes=").rstrip("-")) if range_ and fault != "no-range" else 0
    if start >= len(data) > 0:
        handler.send_error(416)
        return
    headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    reply(handler, fault, 206 if start else 200, headers, data[start:])


def pass_on(handler: BaseHTTPRequestHandler, server: Server, upstream: str) -> None:
    """Answers with what the other server says; only what is read is spoilt."""
    parts = urlsplit(handler.path)
    reads = handler.command == "GET" and not parts.query
    path = unquote(parts.path).lstrip("/")
    fault = server.next_fault(path, handler.headers.get("Range", "")) if reads else ""
    connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=30)
    body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    connection.request(handler.command, handler.path, body, dict(handler.headers))
    response = connection.getresponse()
    data = response.read()
    drop = {"content-length", "transfer-encoding", "connection", "date", "server"}
    headers = {name: value for name, value in response.getheaders() if name.lower() not in drop}
    length = int(response.getheader("Content-Length") or len(data))
    connection.close()
    reply(handler, fault, response.status, headers, data, length if handler.command == "HEAD" else None)


def reply(
    handler: BaseHTTPRequestHandler,
    fault: str,
    status: int,
    headers: dict[str, str],
    body: bytes,
    length: int | None = None,
) -> None:
    handler.close_connection = True
    if fault.isdigit():
        handler.send_error(int(fault))
        return
    if fault == "refuse":
        return  # closed without an answer
    length = len(body) if length is None else length
    if fault == "stall":
        time.sleep(1)  # longer than the test has patience
    if fault == "wrong":
        body = bytes(len(body))
    elif fault == "flip":
        body = body[: length // 3] + bytes([body[length // 3] ^ 1]) + body[length // 3 + 1 :]
    elif fault == "cut":  # whole, by its own account
        body = body[: length // 2]
        length = len(body)
    elif fault in ("short", "drop"):
        body = body[: len(body) * 2 // 3]
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(body)
        handler.wfile.flush()
        if fault == "drop":  # a reset rather than an end
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
