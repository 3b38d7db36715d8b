"""Wrappers around functions of a host framework: installed once, checked when they are.

A room lists what it touches as `Hook`s and says with which version of its host it was tested.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dqa_plugins.errors import DQAWarning, FrameworkMismatch

MARK = "__dqa_plugins_hook__"


@dataclass(frozen=True)
class Host:
    """A host framework as it is installed.

    Args:
        name: of its package, as pip knows it.
        version: installed.
        tested: the version that the room was tested with.
        room: the adapter's name, for messages.
        otherwise: what the user can do instead of installing the tested version.
    """

    name: str
    version: str
    tested: str
    room: str
    otherwise: str = ""

    @property
    def known(self) -> bool:
        """True for the tested minor version."""
        return self.version.split(".")[:2] == self.tested.split(".")[:2]

    @property
    def way_out(self) -> str:
        """What to do about another version."""
        install = f"pip install '{self.name}=={'.'.join(self.tested.split('.')[:2])}.*'"
        return f"{install}, or {self.otherwise}" if self.otherwise else install


def check_version(host: Host, *, strict: bool = False) -> None:
    """Say once, in one sentence, that a host is not of the tested minor version.

    Args:
        host: as installed.
        strict: refuse it instead of warning: the room stands on internals that no signature shows.

    Raises:
        FrameworkMismatch: it is another version, and `strict`.
    """
    if host.known:
        return
    if strict:
        raise FrameworkMismatch(
            f"the {host.room} adapter stands on internals of {host.name} {host.tested}; found {host.version}. "
            f"{host.way_out}."
        )
    warnings.warn(
        DQAWarning(
            f"the {host.room} adapter was tested with {host.name} {host.tested}, found {host.version}: all that it "
            f"hooks into is there, but compare results, or {host.way_out}."
        ),
        stacklevel=3,
    )


def require(owner: Any, name: str, host: Host, parameters: tuple[str, ...] = ()) -> Callable[..., Any]:
    """A function of the host, if it is there and takes what it took.

    Args:
        owner: a module or class of the host.
        name: of the function.
        host: for the message.
        parameters: names of its first parameters.

    Raises:
        FrameworkMismatch: it is gone, or takes other parameters.
    """
    function = getattr(owner, name, None)
    where = f"{owner.__name__}.{name}"
    if not callable(function):
        raise FrameworkMismatch(
            f"{where} is gone in {host.name} {host.version}; the {host.room} adapter stands on it. It was tested with "
            f"{host.name} {host.tested}: {host.way_out}."
        )
    if parameters:
        found = tuple(inspect.signature(function).parameters)
        if found[: len(parameters)] != parameters:
            raise FrameworkMismatch(
                f"{where} takes {found} in {host.name} {host.version}, not {parameters}; the {host.room} adapter was "
                f"tested with {host.name} {host.tested}: {host.way_out}."
            )
    return function


@dataclass(frozen=True)
class Hook:
    """A function of the host that gets a wrapper.

    Args:
        owner: module or class that holds it.
        name: of the function.
        parameters: names of its first parameters.
        wrap: takes the function, gives the wrapper.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]


def install(hooks: list[Hook], host: Host, *, strict: bool = False) -> None:
    """Put the wrappers in place; a second call changes nothing.

    Raises:
        FrameworkMismatch: a function is gone, or its parameters changed; nothing is wrapped then.
    """
    waiting = [hook for hook in hooks if not getattr(getattr(hook.owner, hook.name, None), MARK, False)]
    originals = [require(hook.owner, hook.name, host, hook.parameters) for hook in waiting]
    if waiting:
        check_version(host, strict=strict)
    for hook, original in zip(waiting, originals, strict=True):
        wrapper = functools.wraps(original)(hook.wrap(original))
        setattr(wrapper, MARK, True)
        setattr(hook.owner, hook.name, wrapper)
