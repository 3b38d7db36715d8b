"""A progress bar where tqdm is installed and wanted; log messages otherwise.

Bars go to stderr. Those that no argument turns off come after two seconds, and not inside of another call with a bar,
shown or not; TQDM_DISABLE=1 in the environment turns off all.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

PATIENCE = 2.0  # seconds that a call may take in silence
logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_open = threading.local()  # `count`: bars around what runs now


def counted(items: Iterable[Item], *, what: str, unit: str) -> Iterator[Item]:
    """Items, with a progress bar once they have taken two seconds.

    Args:
        items: what is worked on, a step each; their number is shown where it is known.
        what, unit: see `Progress`.
    """
    total = len(items) if isinstance(items, Sized) else None
    with Progress(total, not _inside(), what=what, unit=unit, delay=PATIENCE, leave=False) as bar:
        for item in items:
            yield item
            bar.advance()


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Show the seconds of a call that has no steps, once it has taken two; also a decorator."""
    ended = threading.Event()

    def show() -> None:
        if not ended.wait(PATIENCE):
            with Progress(None, True, round(PATIENCE), what=what, unit=" s", leave=False, form="{desc}: {n} s") as bar:
                while not ended.wait(1.0):
                    bar.advance()

    watch = None if _inside() else threading.Thread(target=show, daemon=True)
    if watch is not None:
        watch.start()
    try:
        with Progress(None, False, what=what, unit=" s"):
            yield
    finally:
        ended.set()
        if watch is not None:
            watch.join()


def _inside() -> bool:
    return getattr(_open, "count", 0) > 0


class Progress:
    """Counts the steps of a long call.

    Args:
        total: steps in all; None where that is not known.
        shown: False: no bar.
        done: steps done before (resumed).
        what: is being done, "ranking channels".
        unit: of a step, "channel".
        delay: seconds before the bar is drawn.
        leave: False: it goes away at the end.
        form: of the line, as tqdm's bar_format has it.
    """

    def __init__(
        self,
        total: int | None,
        shown: bool,
        done: int = 0,
        *,
        what: str,
        unit: str,
        delay: float = 0.0,
        leave: bool = True,
        form: str | None = None,
    ) -> None:
        self._bar: Any = None
        self._what = what
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                logger.info("tqdm is not installed: no progress bar; %s, %s %ss", what, total, unit)
            else:
                self._bar = tqdm(
                    total=total, initial=done, desc=what, unit=unit, delay=delay, leave=leave, bar_format=form
                )

    def at(self, name: str) -> None:
        """Say what comes now: a layer, a method, a backend."""
        logger.info("%s: %s", self._what, name)
        if self._bar is not None:
            self._bar.set_postfix_str(name)

    def advance(self, count: int = 1) -> None:
        """Some steps are done."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """The bar is done with."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        _open.count = getattr(_open, "count", 0) + 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.count -= 1
        self.close()
