"""Scopes of the config: names and {re} patterns, resolved to the operations of an NNCF graph.

A scope is the name of an NNCF operation ('fc/linear/0'), the qualified name of a module ('layer2.0': everything in
it), or '{re}' and a regular expression which matches, from the start, one of the two. As in NNCF, ignoring an
operation leaves its inputs and its weight float.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from nncf.common.graph.graph import NNCFGraph
from torch import nn

from dqa_plugins.graph.operations import facts
from dqa_plugins.host.skip import resolve_skip, within

from .config import Entry, InvalidConfig

PATTERN = "{re}"


def matcher(scope: str, key: str) -> Callable[[str], bool]:
    """A test for names.

    Raises:
        InvalidConfig: the regular expression is none.
    """
    if not scope.startswith(PATTERN):
        return scope.__eq__
    try:
        pattern = re.compile(scope[len(PATTERN) :])
    except re.error as error:
        raise InvalidConfig(f"{key}: {scope!r} is no regular expression: {error}.") from error
    return lambda name: pattern.match(name) is not None


def unmatched(key: str, scope: str, known: Iterable[str]) -> InvalidConfig:
    """The error for a scope that matches nothing."""
    names = sorted(set(known))
    close = difflib.get_close_matches(scope.removeprefix(PATTERN), names, n=3, cutoff=0.5) or names[:8]
    return InvalidConfig(f"{key}: {scope!r} matches nothing in the model; there are {', '.join(close)}, ...")


def operations_of(scopes: Iterable[str], key: str, enclosing: dict[str, str]) -> set[str]:
    """Names of the NNCF operations that the scopes match.

    Args:
        scopes: names or patterns.
        key: of the config, for messages.
        enclosing: {operation name: path of its module}.

    Raises:
        InvalidConfig: a scope matches nothing.
    """
    found = set()
    for scope in scopes:
        match = matcher(scope, key)
        hits = {
            name
            for name, path in enclosing.items()
            if match(name) or match(path) or (path + ".").startswith(scope + ".")
        }
        if not hits:
            raise unmatched(key, scope, [*enclosing, *filter(None, enclosing.values())])
        found |= hits
    return found


def layers_to_skip(skip: Iterable[str], model: nn.Module, enclosing: dict[str, str]) -> set[str]:
    """Operations of "first" and "last" (layers with a weight, in order of execution) and of module names."""
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    weighted = [path for path in enclosing.values() if path and isinstance(model.get_submodule(path), kinds)]
    found = set()
    for name in skip:
        if name in ("first", "last", "ends"):
            layers = resolve_skip((name,), weighted, enclosing.values())
            found |= {op for op, around in enclosing.items() if within(around, layers)}
        else:
            found |= operations_of([name], "compression.skip", enclosing)
    return found


def ignored_operations(entry: Entry, graph: NNCFGraph, model: nn.Module, enclosing: dict[str, str]) -> list[str]:
    """What NNCF's IgnoredScope should name: ignored_scopes, skip, and all that target_scopes does not name.

    Raises:
        InvalidConfig: a scope matches nothing.
    """
    ignored = operations_of(entry.ignored, "compression.ignored_scopes", enclosing)
    ignored |= layers_to_skip(entry.skip, model, enclosing)
    if entry.target:
        wanted = operations_of(entry.target, "compression.target_scopes", enclosing)
        # not what only moves values: an ignored max-pool would stop the quantizer of the convolution behind it from
        # moving up to the ReLU
        ignored |= {
            node.node_name
            for node in graph.get_all_nodes()
            if node.node_name in enclosing and node.node_name not in wanted and facts(node.node_type).kind != "moves"
        }
    return sorted(ignored)
