"""A server in front of another that fails every Nth request: 503, or a body that breaks off."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOP = ("connection", "transfer-encoding", "keep-alive")


class Flaky(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def forward(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with server.lock:
            server.log.append((self.command, self.path))
            number = len(server.log)
        how = server.fail(number, self.command, self.path)
        if how == "refuse":
            return self.answer(503, [], b"")
        there = http.client.HTTPConnection("127.0.0.1", server.behind, timeout=30)
        try:
            there.request(self.command, self.path, body, dict(self.headers.items()))
            answer = there.getresponse()
            content = answer.read()
        finally:
            there.close()
        if how == "after":  # done there, but nobody hears of it
            return self.answer(503, [], b"")
        return self.answer(answer.status, answer.getheaders(), content, cut=how == "cut")

    def answer(
        self, code: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(code)
        named = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in HOP:
                self.send_header(name, value)
        if "content-length" not in named:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = forward

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def in_front_of(port: int, fail: Callable[[int, str, str], str]) -> Iterator[Any]:
    """fail(number, method, path): '' to pass on, 'refuse', 'after' or 'cut'. Has port and log."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    server.behind, server.fail, server.log, server.lock = port, fail, [], threading.Lock()
    server.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
