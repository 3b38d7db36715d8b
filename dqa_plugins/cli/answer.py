"""What a command answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The same answer for people and for programs.

    Attributes:
        text: for people.
        data: JSON-compatible.
        good: whether everything that was looked at is as it should be.
    """

    text: str
    data: dict[str, Any]
    good: bool = True
