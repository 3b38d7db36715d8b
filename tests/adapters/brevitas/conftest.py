"""Brevitas may be missing: then this folder is skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("brevitas", reason="the Brevitas adapter needs brevitas")


@pytest.fixture(autouse=True)
def missing_keys_are_reported() -> Iterator[None]:
    """Brevitas' quantize leaves this switched on when an error ends it (0.13.4)."""
    from brevitas import config

    before = config.IGNORE_MISSING_KEYS
    yield
    config.IGNORE_MISSING_KEYS = before
