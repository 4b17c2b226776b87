"""Where a merge's time goes: a hundred times a second, what is each of its threads doing?

A thread's work is named after the innermost function that says: of what reads (and widens) weights,
of SHA-256, of what writes, and of methods, norms and checks, which compute. Waiting counts nothing.
"""

import sys
import threading
import time
from collections import Counter
from types import FrameType

KINDS = ("reading", "hash", "computing", "writing")
WAITING = ("threading.py", "queue.py", "futures/thread.py", "futures/_base.py")
PLACES = {
    "hashlib.py": "hash",
    "optmerge_core/checkpoints/writer.py": "writing",
    "optmerge_core/checkpoints/parts.py": "writing",
    "optmerge_core/checkpoints/": "reading",
    "optmerge_core/task_vectors/stack.py": "reading",
    "optmerge_core/methods/": "computing",
    "optmerge_core/merging/": "computing",
}
FUNCTIONS = {"apply": "computing", "sha256": "hash", "hash": "hash", "digest": "hash"}


def kind_of(frame: FrameType | None) -> str | None:
    """Which of `KINDS` a thread whose innermost frame this is does; None: it waits, or none."""
    if frame is not None and frame.f_code.co_filename.endswith(WAITING):
        return None
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        place = next((kind for place, kind in PLACES.items() if place in file), None)
        if place:
            return next((kind for part, kind in FUNCTIONS.items() if part in function), place)
        frame = frame.f_back
    return None


class Shares:
    """Looks from when it is made until `read`."""

    def __init__(self, interval: float = 0.01):
        self.seen: Counter[str | None] = Counter()
        self._stopped, self._interval = threading.Event(), interval
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    def _look(self) -> None:
        own = threading.get_ident()
        while not self._stopped.is_set():
            frames = sys._current_frames()
            self.seen.update(kind_of(x) for thread, x in frames.items() if thread != own)
            time.sleep(self._interval)

    def read(self) -> dict[str, float]:
        """Of the time that threads worked, the share of each kind in per cent."""
        self._stopped.set()
        self._looking.join()
        total = sum(self.seen[kind] for kind in KINDS)
        return {f"{kind} (%)": 100 * self.seen[kind] / max(total, 1) for kind in KINDS}
