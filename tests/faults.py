"""A proxy in front of an S3 server that goes wrong by rule, to be told apart from the server's own behaviour.

    with proxy(server.endpoint_url) as faulty:
        faulty.rules = [Rule("slow_down", method="GET", times=2)]
        ... storage at faulty.endpoint_url ...
        faulty.hits            # how often a rule struck

Faults: `slow_down` (503), `internal_error` (500) and `forbidden` (403) are answers; `drop` closes before the server is
asked; `lost` asks it and resets the connection without an answer; `reset` and `truncate` break off in the middle of the
body, the one with a reset, the other with an ordinary end; `short` answers with half the body as if it were all;
`stall` falls silent in the middle of it.
"""

import contextlib
import http.client
import random
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error."),
    "forbidden": (403, "AccessDenied", "Access Denied"),
}
BREAKS = ("drop", "lost", "reset", "truncate", "short", "stall")


@dataclass
class Rule:
    """Strikes requests whose method and path (`/bucket/key?query`) match: all, the first `times`, or a `share`."""

    fault: str
    method: str = ""  # regular expressions, searched
    path: str = ""
    times: int | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.fault not in (*ANSWERS, *BREAKS):
            raise ValueError(f"fault: expected one of {(*ANSWERS, *BREAKS)}, got {self.fault!r}")


@dataclass
class Proxy:
    """What the tests see of it."""

    endpoint_url: str
    rules: list[Rule] = field(default_factory=list)
    requests: int = 0
    hits: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def fault_for(self, method: str, path: str) -> str | None:
        """The fault of the first rule that strikes this request."""
        with self._lock:
            self.requests += 1
            for rule in self.rules:
                if not (re.search(rule.method, method) and re.search(rule.path, path)):
                    continue
                if rule.times == 0 or self._random.random() >= rule.share:
                    continue
                if rule.times is not None:
                    rule.times -= 1
                self.hits += 1
                return rule.fault
        return None


@contextlib.contextmanager
def proxy(endpoint_url: str, *, certificate: Path | None = None) -> Iterator[Proxy]:
    """A proxy on loopback for the block, without rules at first; it speaks TLS with a PEM of key and certificate."""
    server = _Server(("127.0.0.1", 0), _Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    server.target = urlsplit(endpoint_url).netloc
    server.proxy = Proxy(f"{scheme}://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.proxy.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    target: str
    proxy: Proxy
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_any(self) -> None:
        body = self._body()
        fault = self.server.proxy.fault_for(self.command, self.path)
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            self._answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())
        elif fault == "drop":
            self.close_connection = True
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 (names that http.server asks for)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the signed host among them
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "expect"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            self._relay(answer, answer.read(), fault)
        finally:
            upstream.close()

    def _relay(self, answer: http.client.HTTPResponse, data: bytes, fault: str | None) -> None:
        if fault == "lost" or (fault in ("reset", "truncate", "short") and not data):
            self._reset()
            return
        if fault == "short":
            data, fault = data[: len(data) // 2], None
        length = len(data) if self.command != "HEAD" else int(answer.headers.get("Content-Length", 0))
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data if fault is None else data[: len(data) // 2])
        self.wfile.flush()
        if fault is not None:
            self.close_connection = True
        if fault == "stall":
            self.server.proxy.ended.wait(60)
        if fault == "reset":
            self._reset()

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reset(self) -> None:
        """End the connection with a reset, at once and without what is still to be sent."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Nothing: tests count, they do not read."""
