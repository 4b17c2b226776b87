"""A web server on this machine that does what a test's script says, good or bad."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Web

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((path, dict(self.headers)))
        faults = self.server.faults.get(path) or []
        fault = (faults[0] if faults[0].get("always") else faults.pop(0)) if faults else {}
        if "status" in fault:
            self.answer(fault["status"], b"", fault.get("headers"))
        elif path in self.server.redirects:
            location = {"Location": self.server.redirects[path]}
            self.answer(302, b"", location | self.server.headers(path))
        elif path in self.server.pages:
            self.answer(200, json.dumps(self.server.pages[path]).encode())
        elif (file := self.server.file(path)) is not None:
            self.send(path, file.read_bytes(), fault)
        else:
            self.answer(404, b"no such file")

    def send(self, path: str, content: bytes, fault: dict) -> None:
        headers = {"ETag": fault.get("etag", '"1"')} | self.server.headers(path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or "whole" in fault:
            self.answer(200, content, headers)
            return
        start, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if start > end:
            self.answer(416, b"")
            return
        body = content[start : end + 1][: fault.get("bytes")]
        shift, total = fault.get("shift", 0), len(content) + fault.get("more", 0)
        headers["Content-Range"] = f"bytes {start + shift}-{start + len(body) - 1 + shift}/{total}"
        if "encoding" in fault:
            headers["Content-Encoding"] = fault["encoding"]
        # Cut off: the header promises what never comes.
        length = end + 1 - start if "cut" in fault else None
        self.server.sent.append((path, start, start + len(body)))
        self.answer(206, body, headers, length)

    def answer(self, status: int, body: bytes, headers=None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None:
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        pass


class Web(ThreadingHTTPServer):
    """Serves `folders` (first part of the path -> folder), in a `with` block.

    `faults`: path -> what goes wrong at its next requests, one dict each (`always`: at all of
    them): status and headers; bytes (no more of the range is sent), with cut (though promised);
    shift (of the range sent), more (of the file's size), whole (the range is not looked at), etag,
    encoding. `redirects`: path -> URL. `pages`: path -> JSON. `requests` and `sent` tell what was
    asked for (path, headers) and which weights went out (path, first byte, end).
    """

    daemon_threads, handler = True, Handler

    def __init__(self, folders: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.folders, self.faults, self.redirects, self.pages = folders, {}, {}, {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent: list[tuple[str, int, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def file(self, path: str) -> Path | None:
        _, _, rest = path.partition("/")
        for prefix, folder in self.folders.items():
            if rest.startswith(f"{prefix}/"):
                file = folder / rest.removeprefix(f"{prefix}/")
                return file if file.is_file() else None
        return None

    def headers(self, path: str) -> dict[str, str]:
        return {}

    def handle_error(self, request, client_address) -> None:
        pass  # the client hung up

    def __enter__(self) -> Web:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
