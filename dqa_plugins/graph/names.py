"""Site names: how a quantized tensor is called.

The same in every adapter, before and after conversion: the original qualified name of the last module of the fused
pattern (`blocks.0.relu1`), `<enclosing module>.<op>.<k>` for functional operations, `input.<k>` for inputs. Rank
tables, QPP sites and error messages use these names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dqa_plugins.errors import DuplicateSites

# How Python spells an operation must not change its name.
_SPELLINGS = {
    **{f"i{op}": op for op in ("add", "mul", "sub", "matmul", "pow")},
    **{f"r{op}": op for op in ("add", "mul", "sub", "matmul", "pow")},
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "div",
    "rdiv": "div",
    "idiv": "div",
    "true_divide": "div",
    "ifloordiv": "floordiv",
    "rfloordiv": "floordiv",
    "floor_divide": "floordiv",
}


class SiteNames:
    """Hands out site names in order of first execution, each once.

    Args:
        reserved: qualified names of the modules that are called: no operation is called like one of them.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._reserved = frozenset(reserved)
        self._given: set[str] = set()
        self._operations: Counter[tuple[str, str]] = Counter()
        self._modules: Counter[str] = Counter()

    def module(self, qualified_name: str) -> str:
        """Name of a module call: its qualified name; the k-th repeated call of one module appends `.k`."""
        while True:
            calls = self._modules[qualified_name]
            self._modules[qualified_name] += 1
            name = f"{qualified_name}.{calls}" if calls else qualified_name
            if self._take(name, own=calls == 0):
                return name

    def operation(self, enclosing: str, op: str) -> str:
        """Name of a functional operation: `<enclosing>.<op>.<k>`, k counting this op in this module."""
        op = op.strip("_")
        op = _SPELLINGS.get(op, op)
        while True:
            index = self._operations[enclosing, op]
            self._operations[enclosing, op] += 1
            name = f"{enclosing}.{op}.{index}" if enclosing else f"{op}.{index}"
            if self._take(name, own=False):
                return name

    def _take(self, name: str, *, own: bool) -> bool:
        if name in self._given or (name in self._reserved and not own):
            return False
        self._given.add(name)
        return True


def require_unique(names: Iterable[str], model: str = "the model") -> None:
    """Raise unless no two sites have the same name.

    Raises:
        DuplicateSites: some have; rank tables, QPP sites and settings would mean the wrong one.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DuplicateSites(
            f"{model}: {len(twice)} site name{'s' if len(twice) > 1 else ''} given to more than one quantizer: "
            f"{', '.join(map(repr, twice[:8]))}. Rename the modules, or leave one of them out with a method of None."
        )
