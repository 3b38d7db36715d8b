"""skip=("first", "last", "blocks.0"): which layers stay float by position or by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dqa_plugins.errors import InvalidArgument


def check_skip(skip: Iterable[str]) -> tuple[str, ...]:
    """The user's `skip` as a tuple.

    Raises:
        InvalidArgument: a bare string, whose letters would be taken for names.
    """
    if isinstance(skip, str):
        raise InvalidArgument(f"skip={skip!r}: give a tuple of names, such as ({skip!r},).")
    return tuple(skip)


def within(path: str, names: Iterable[str]) -> bool:
    """True if a path is one of the names, or lies inside one."""
    return any(path == name or path.startswith(name + ".") for name in names)


def resolve_skip(skip: Iterable[str], layers: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Names of the modules that stay float.

    Args:
        skip: "first", "last", "ends", or qualified names of modules. "ends" is the first and the last layer of a
            network with more than three: of a smaller one little would be left to quantize.
        layers: paths of the layers with a weight, in order of execution.
        paths: of all modules that are known.

    Raises:
        InvalidArgument: a name is no module of the model.
    """
    known = list(paths)
    found: list[str] = []
    for item in skip:
        if item in ("first", "last"):
            found.extend(layers[:1] if item == "first" else layers[-1:])
        elif item == "ends":
            found.extend((layers[0], layers[-1]) if len(layers) > 3 else ())
        elif any(within(path, (item,)) for path in known):
            found.append(item)
        else:
            raise InvalidArgument(
                f"skip={item!r}: the model has no such module; layers are {', '.join(layers[:8])}, ..."
            )
    return found
