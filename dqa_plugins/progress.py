"""A progress bar where tqdm is installed and wanted; log messages otherwise."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class Progress:
    """Counts the steps of a long call.

    Args:
        total: steps in all.
        shown: False: no bar.
        done: steps done before (resumed).
        what: is being done, "ranking channels".
        unit: of a step, "channel".
    """

    def __init__(self, total: int, shown: bool, done: int = 0, *, what: str, unit: str) -> None:
        self._bar: Any = None
        self._what = what
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                logger.info("tqdm is not installed: no progress bar; %s, %d %ss", what, total, unit)
            else:
                self._bar = tqdm(total=total, initial=done, desc=what, unit=unit)

    def at(self, name: str) -> None:
        """Say what comes now: a layer, a method, a backend."""
        logger.info("%s: %s", self._what, name)
        if self._bar is not None:
            self._bar.set_postfix_str(name)

    def advance(self, count: int = 1) -> None:
        """Some steps are done."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
