"""Files on a web server, read by HTTP range requests (RFC 9110, section 14).

What fails for now is tried again, from the byte where it stopped; what will not get better is one
clear error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from time import sleep, time
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx, parse_ratelimit_headers
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import CheckpointError

ATTEMPTS, FIRST_ATTEMPTS = 8, 4  # in a row without progress; on a server that never answered yet
PROGRESS = 1 << 20  # bytes: an attempt that brought as much is none in vain
LONGEST_WAIT = 300.0  # seconds: what a server may ask for, and the window of the hub's rate limits
MAX_WHOLE = 200_000_000  # bytes of a file that is not weights
TIMEOUT = 30.0  # seconds without a byte
DOWNLOAD = "download the checkpoint and give the local folder instead"

Result = TypeVar("Result")


class NotThere(CheckpointError):
    """The server has no such file, or does not show it."""


class _Again(Exception):
    """An attempt that failed and may succeed if repeated, at the earliest after `wait` seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class RemoteFile:
    """A file on a web server.

    An attempt that fails for now (no connection, cut off, too slow, HTTP 429 or 5xx) is repeated,
    from the byte where it stopped, after 1, 2, 4 … 60 seconds or what the server asks for. `size`
    and version are those of the first answer, and an error if a later answer has others. Raises
    `CheckpointError` (`NotThere` for HTTP 401, 403, 404 and 410), naming the URL and the remedy.

    Not by tenacity, which counts attempts: here progress makes up for failures, a server says how
    long to wait, and one that never answered is given up sooner. As its callbacks it is longer.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, size: int | None = None):
        self.url, self.size = url, size
        self.headers = dict(headers or {})
        self.version: str | None = None
        self._pinned = size is not None  # by a commit: mirrors may then tag one content differently
        self._redirected: str | None = None

    def read(
        self, start: int, stop: int, on_bytes: Callable[[int], None] | None = None
    ) -> bytearray:
        """Bytes start to stop; `on_bytes` is told each time how many have come."""
        buffer, done = bytearray(stop - start), 0

        def attempt() -> None:
            nonlocal done
            while done < len(buffer):
                came = 0
                for chunk in self._answer(start + done, stop):
                    if done + len(chunk) > len(buffer):
                        raise _Again("more bytes than asked for")
                    buffer[done : done + len(chunk)] = chunk
                    done, came = done + len(chunk), came + len(chunk)
                    if on_bytes:
                        on_bytes(len(chunk))
                if done < len(buffer) and came < PROGRESS:
                    raise _Again(f"{came} bytes where {len(buffer) - done + came} were asked for")

        self._persist(attempt, lambda: done)
        return buffer

    def fetch(self) -> bytes:
        """The whole file, for small ones."""

        def attempt() -> bytes:
            content = bytearray()
            for chunk in self._answer():
                content += chunk
                if len(content) > MAX_WHOLE:
                    raise CheckpointError(f"{self.url}: larger than {MAX_WHOLE} bytes; {DOWNLOAD}")
            return bytes(content)

        return self._persist(attempt)

    def _persist(
        self, attempt: Callable[[], Result], progress: Callable[[], int] = lambda: 0
    ) -> Result:
        failures = 0
        while True:
            before = progress()
            try:
                try:
                    return attempt()
                except httpx.TransportError as error:
                    raise _Again(str(error) or type(error).__name__) from error
            except _Again as error:
                failures = 1 if progress() - before >= PROGRESS else failures + 1
                if failures >= (ATTEMPTS if self.size is not None else FIRST_ATTEMPTS):
                    raise CheckpointError(
                        f"{self.url}: {error}; given up after {failures} attempts; check the "
                        f"network and run again, or {DOWNLOAD}"
                    ) from error
                wait = min(2.0 ** (failures - 1), 60.0) if error.wait is None else error.wait
                if wait >= 5:
                    tqdm.write(f"{self.url}: {error}; again in {wait:.0f} s", file=sys.stderr)
                sleep(wait)
            except (httpx.HTTPError, httpx.InvalidURL, OfflineModeIsEnabled) as error:
                raise CheckpointError(f"{self.url}: {error}; check the address") from error

    def _answer(self, start: int | None = None, stop: int = 0) -> Iterator[bytes]:
        """One request and the body of its answer, chunk by chunk: a range, or the whole file."""
        redirected = self._redirected
        url, headers = redirected or self.url, dict(self.headers)
        if redirected and _origin(redirected) != _origin(self.url):
            headers.pop("authorization", None)
        if start is not None:
            # Compressed, the bytes would not be the file's.
            headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as answer:
            if redirected and answer.status_code in (400, 401, 403, 404, 410):
                self._redirected = None  # the signed address of a CDN expires
                raise _Again(f"HTTP {answer.status_code} from {_origin(redirected)[1]}", 0.0)
            self._check_status(answer, 200 if start is None else 206)
            if start is None:
                yield from answer.iter_bytes()
                return
            self._check_range(answer, start, stop)
            if answer.history:  # further ranges need not ask again: the hub counts its requests
                self._redirected = str(answer.url)
            yield from answer.iter_raw()

    def _check_status(self, answer: httpx.Response, expected: int) -> None:
        status = answer.status_code
        if status == expected:
            return
        if status in (408, 429) or status >= 500:
            raise _Again(f"HTTP {status}", _asked_wait(answer.headers))
        problem = f"{self.url}: HTTP {status}"
        if status in (404, 410):
            raise NotThere(f"{problem}, no such file there; check name, revision and address")
        if status in (401, 403):
            raise NotThere(
                f"{problem}, access denied; check the address; for a private or gated model of the "
                "hub accept its conditions there and log in with `hf auth login`"
            )
        if status == 416:
            raise CheckpointError(
                f"{problem}, the file is shorter than it should be; it is truncated there"
            )
        if status == 200:
            raise CheckpointError(f"{self.url}: the server does not read ranges; {DOWNLOAD}")
        raise CheckpointError(f"{problem} is not understood; {DOWNLOAD}")

    def _check_range(self, answer: httpx.Response, start: int, stop: int) -> None:
        headers = answer.headers
        if headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(f"{self.url}: the server compresses the weights; {DOWNLOAD}")
        given = headers.get("content-range", "none")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given)
        if match is None or int(match[1]) != start or not start <= int(match[2]) < stop:
            raise _Again(f"asked for bytes {start}-{stop - 1}, the answer's range is {given}")
        size, version = int(match[3]), headers.get("etag") or headers.get("last-modified")
        if self.size is None:
            self.size, self.version = size, version
        elif self._pinned:
            self.version = version
        if (size, version) != (self.size, self.version):
            raise CheckpointError(
                f"{self.url}: {size} bytes, version {version}, where {self.size} bytes, version "
                f"{self.version}, are expected; the file has changed: run again, or give a fixed "
                "revision"
            )


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks a client to wait, by Retry-After or the hub's rate limits."""
    after, limit = headers.get("retry-after", ""), parse_ratelimit_headers(headers)
    if after.isdecimal():
        wait = float(after)
    elif after:
        try:
            wait = parsedate_to_datetime(after).timestamp() - time()
        except ValueError:
            return None
    elif limit and limit.remaining == 0:
        wait = limit.reset_in_seconds + 1.0
    else:
        return None
    return min(max(wait, 0.0), LONGEST_WAIT)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
