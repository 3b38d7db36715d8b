"""Brevitas may be missing: then this folder is skipped, with the reason."""

from __future__ import annotations

import pytest

pytest.importorskip("brevitas", reason="the Brevitas adapter needs brevitas")
