"""How kernels are compiled: when they are first called, cached on disk, and not in silence.

Requirements this file meets:

- Nothing is compiled on import. numba keeps what it compiled beside the sources (`__pycache__`), or below the user's
  cache directory where that is not writable; NUMBA_CACHE_DIR names another place.
- Compilation that takes longer than two seconds in all shows a progress bar, whoever called: numba tells of every
  compilation (`numba.core.event`), and this listens. How many kernels there will be is not known.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

from numba import njit
from numba.core import event

from ..progress import PATIENCE, Progress

# a kernel: releases the GIL, and is kept on disk
kernel: Any = functools.partial(njit, cache=True, nogil=True)


class _Announcement(event.Listener):
    """Shows what takes so long; `spent`: seconds of compilation so far."""

    def __init__(self) -> None:
        self.depth, self.spent, self.began, self.done = 0, 0.0, 0.0, 0
        self.timer: threading.Timer | None = None
        self.bar: Progress | None = None

    def on_start(self, event: Any) -> None:
        if not _ours(event):
            return
        self.depth += 1
        if self.depth == 1:
            self.began = time.monotonic()
            self.timer = threading.Timer(max(PATIENCE - self.spent, 0.0), self.show)
            self.timer.daemon = True
            self.timer.start()

    def on_end(self, event: Any) -> None:
        if not _ours(event):
            return
        self.depth -= 1
        self.done += 1
        if self.bar is not None:
            self.bar.advance()
        if self.depth == 0 and self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.spent += time.monotonic() - self.began
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def show(self) -> None:
        if self.depth:
            what = "compiling for this processor, once"
            self.bar = Progress(None, True, self.done, what=what, unit=" kernel", leave=False)


def _ours(found: Any) -> bool:
    module: str = found.data["dispatcher"].py_func.__module__
    return module.startswith(f"{__package__}.")


event.register("numba:compile", _Announcement())
