"""Classes of cases: a strategy that draws a case, and a check that ends in the right result or in a typed error.

A case is a NamedTuple of plain values, so that its repr is a reproducer: `replay(name, case)`.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from dqa_plugins import DQAError

LABEL = "block.relu"  # the site's name wherever a case has one quantizer


class Defect(AssertionError):
    """A wrong result, an error of somebody else, or a typed one that does not say enough."""


class Refused(Exception):
    """A host refused, with an error of its own that says what is wrong (load_state_dict names the keys)."""


@dataclass(frozen=True)
class CaseClass:
    """One class of cases.

    Args:
        name: what the command line, the report and the docs call it.
        strategy: draws a case.
        check: takes a case; raises where the result is wrong.
        names: texts of which a refusal has to contain one; () where it may say anything.
        share: of the time, relative to the others.
        needs: packages without which the class is left out.
        slow: a case takes seconds; left out of short runs.
    """

    name: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    names: tuple[str, ...] = (LABEL,)
    share: float = 1.0
    needs: tuple[str, ...] = ()
    slow: bool = False

    def run(self, case: Any) -> bool:
        """Run one case. True: the right result; False: refused.

        Raises:
            Defect: neither.
        """
        grad = torch.is_grad_enabled()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.check(case)
        except DQAError as error:
            self._refused(error)
            return False
        except Refused:
            return False
        except Defect:
            raise
        except AssertionError as error:
            raise Defect(f"wrong result: {error}") from error
        except UnsatisfiedAssumption:
            raise
        except Exception as error:
            raise Defect(f"an error of somebody else, {type(error).__name__}: {error}") from error
        finally:
            torch.set_grad_enabled(grad)
        return True

    def _refused(self, error: DQAError) -> None:
        text = str(error)
        if not isinstance(error, ValueError | TypeError | RuntimeError):
            raise Defect(f"{type(error).__name__} is no built-in error as well") from error
        if len(text) < 20 or not text.rstrip().endswith((".", ")", "]")):
            raise Defect(f"a refusal that does not explain itself: {text!r}") from error
        if self.names and not any(name in text for name in self.names):
            raise Defect(f"a refusal that names none of {self.names}: {text!r}") from error


CLASSES: dict[str, CaseClass] = {}


def case_class(name: str, strategy: st.SearchStrategy[Any], **settings: Any) -> Callable[..., Callable[[Any], None]]:
    """Register a check as a class of cases."""

    def register(check: Callable[[Any], None]) -> Callable[[Any], None]:
        if name in CLASSES:
            raise ValueError(f"two classes are called {name!r}")
        CLASSES[name] = CaseClass(name, strategy, check, **settings)
        return check

    return register


def load() -> dict[str, CaseClass]:
    """All classes whose packages are installed, by name."""
    from tests import torture

    for module in pkgutil.iter_modules(torture.__path__):
        if module.name.startswith("cases_"):
            importlib.import_module(f"tests.torture.{module.name}")
    return {name: found for name, found in sorted(CLASSES.items()) if all(map(_installed, found.needs))}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def replay(name: str, case: Any) -> None:
    """Run one case of a class again: what a reported defect prints."""
    load()[name].run(case)
