"""Tests. A package, so that `python -m tests.mutations` and `from tests import reference` find it by name."""
