"""One colour and marker per method, in every picture; what the lines of a method differ by is their dashes."""

from __future__ import annotations

from typing import Any

COLOURS = {
    "FP32": "black",
    "int8 of the host": "tab:brown",
    "Direct": "tab:blue",
    "NoisyQuant": "tab:orange",
    "DQA": "tab:green",
    "Dense+Sparse": "tab:red",
    "dynamic": "tab:grey",
    "static": "tab:brown",
    "QPP, paper": "tab:purple",
    "QPP, extended": "tab:cyan",
}
MARKERS = {
    "Direct": "o",
    "NoisyQuant": "v",
    "DQA": "s",
    "Dense+Sparse": "D",
    "dynamic": "P",
    "static": "X",
    "QPP, paper": "^",
    "QPP, extended": "*",
}
LIGHT = {"Direct": "deepskyblue", "DQA": "limegreen"}  # one scale per channel
DASHES = {
    "random channels": ":",
    "first best": "-.",
    "literal": "--",
    "batch scale": "-.",
    "searched clip": "--",
    "script": "--",
    "script's clip": "--",
    "signed": ":",
    "same data": "--",
    "no augmentation": "--",
}


def family(name: str) -> str:
    """The method that a row is a variant of: the longest known name that it begins with.

    Raises:
        KeyError: none; give it a colour here.
    """
    found = [known for known in COLOURS if name == known or name.startswith((known + ",", known + " "))]
    if not found:
        raise KeyError(f"{name!r} has no colour: add its method to {__name__}.COLOURS")
    return max(found, key=len)


def colour(name: str) -> str:
    """Of a row, by its method."""
    method = family(name)
    return LIGHT.get(method, COLOURS[method]) if "channel" in name.split(", ")[-1].split() else COLOURS[method]


def style(name: str) -> dict[str, Any]:
    """Keywords of a line of matplotlib."""
    words = name.split(", ")[1:]
    dashes = next((DASHES[word] for word in words if word in DASHES), "-")
    marker = MARKERS.get(family(name), ".")
    return {"color": colour(name), "marker": marker, "linestyle": dashes, "markersize": 6, "linewidth": 1.6}
