"""A progress bar where tqdm is installed and wanted; log messages otherwise."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class Progress:
    """Counts candidates.

    Args:
        total: candidates in all.
        shown: False: no bar.
        done: candidates done before (resumed).
    """

    def __init__(self, total: int, shown: bool, done: int = 0) -> None:
        self._bar: Any = None
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                logger.info("tqdm is not installed: no progress bar; ranking %d channels", total)
            else:
                self._bar = tqdm(total=total, initial=done, desc="ranking channels", unit="channel")

    def layer(self, name: str) -> None:
        """Say which layer is searched."""
        logger.info("ranking the channels of %s", name)
        if self._bar is not None:
            self._bar.set_postfix_str(name)

    def advance(self, count: int) -> None:
        """Some candidates are done."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
