# SPDX-License-Identifier: MIT
"""An HTTP proxy on loopback that fails a share of the requests, as a network or a store does."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("503", "close", "lost", "cut", "slow")
"""503; closed before the request is passed on, or after it; half a body; late."""

_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_OF_A_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


class FaultProxy:
    """Passes requests on to ``host:port``, but for a share of them, drawn by a seed.

    Use it as a context manager. ``plan`` holds faults of the next requests, before any is drawn;
    ``"none"`` is one that is none. ``counts`` counts the faults, and all requests as ``"all"``.
    """

    def __init__(self, host, port):
        self.target = host, port
        self.reset()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def reset(self, share=0.0, kinds=KINDS, seed=0):
        """Begin anew, with a share of faults of some kinds."""
        self.share = share
        self.kinds = kinds
        self.plan = []
        self.counts = Counter()
        self._random = random.Random(seed)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def draw(self):
        with self._lock:
            kind = "none"
            if self.plan:
                kind = self.plan.pop(0)
            elif self._random.random() < self.share:
                kind = self._random.choice(self.kinds)
            self.counts.update([kind, "all"])
            return kind


def _handler(proxy):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words):
            pass

        def serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            assert "chunked" not in self.headers.get("Transfer-Encoding", "")
            fault = proxy.draw()
            if fault == "slow":
                time.sleep(0.3)
            elif fault == "close":
                self.close_connection = True
                return
            elif fault in ("503", "403"):
                self.answer(int(fault), [], _BUSY if fault == "503" else _DENIED)
                return
            connection = http.client.HTTPConnection(*proxy.target, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_A_HOP}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault == "lost":
                self.close_connection = True
                return
            if fault == "flip" and content:
                content = bytes([content[0] ^ 1]) + content[1:]
            size = None
            if self.command == "HEAD":
                size = answer.headers.get("Content-Length")
            elif fault == "cut":
                size, content = max(1, len(content)), content[: len(content) // 2]
            self.answer(answer.status, answer.getheaders(), content, size)

        def answer(self, status, headers, content, size=None):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _OF_A_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if size is None else size))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                if size is not None:  # more was promised
                    self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

    return Handler
