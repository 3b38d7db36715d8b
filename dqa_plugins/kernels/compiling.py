"""How kernels are compiled: when they are first called, cached on disk, and not in silence.

Requirements this file meets:

- Nothing is compiled on import. numba keeps what it compiled beside the sources (`__pycache__`), or below the user's
  cache directory where that is not writable; NUMBA_CACHE_DIR names another place.
- Compilation that takes longer than two seconds says so, once for each process, whoever called: numba tells of every
  compilation (`numba.core.event`), and this listens.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Any

from numba import njit
from numba.core import event

PATIENCE = 2.0  # seconds of compilation before a message
logger = logging.getLogger(__package__)

# a kernel: releases the GIL, and is kept on disk
kernel: Any = functools.partial(njit, cache=True, nogil=True)


class _Announcement(event.Listener):
    """Says what takes so long; `spent`: seconds of compilation so far."""

    def __init__(self) -> None:
        self.depth, self.spent, self.began = 0, 0.0, 0.0
        self.timer: threading.Timer | None = None

    def on_start(self, event: Any) -> None:
        if not _ours(event):
            return
        self.depth += 1
        if self.depth == 1 and self.spent < PATIENCE:
            self.began = time.monotonic()
            self.timer = threading.Timer(PATIENCE - self.spent, self.say)
            self.timer.daemon = True
            self.timer.start()

    def on_end(self, event: Any) -> None:
        if not _ours(event):
            return
        self.depth -= 1
        if self.depth == 0 and self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.spent += time.monotonic() - self.began

    def say(self) -> None:
        self.spent = PATIENCE  # once is enough
        logger.warning(
            "compiling kernels for this processor, up to half a minute; the next process finds them in numba's cache"
        )


def _ours(found: Any) -> bool:
    module: str = found.data["dispatcher"].py_func.__module__
    return module.startswith(f"{__package__}.")


event.register("numba:compile", _Announcement())
