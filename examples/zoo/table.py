"""The page of the zoo, from its cells: what was wanted, what misses, whose failure it is."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .entry import Entry
from .hosts import ROOMS

RATIO, SMALL = 1.5, 0.02  # wanted: at most so many times the host's own error, or below this share of the output
CHECKS = {
    "batch": "every quantizer gives each sample alone what it gives in the batch",
    "silent": "every quantizer runs in the forward",
    "deepcopy": "a deep copy computes the same",
    "state_dict": "a copy with other weights and scales computes the same once it has loaded the state",
    "stored": "with activations held as packed bytes it computes the same (FX, PT2E)",
    "onnxruntime": "single quantizers in ONNX Runtime give the same values, optimizations on and off",
}
OURS = ("8 bits", "4 bits", "floats", *CHECKS)  # steps whose failure is not the host's

Cell = dict[str, Any]


def merged(cells: Iterable[Cell]) -> str:
    """All cells as one JSON list, a line each, without tracebacks."""
    lines = [json.dumps({key: value for key, value in cell.items() if key != "trace"}) for cell in cells]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def misses_stock(cell: Cell) -> bool:
    """Whether 8 bits are worse than what was wanted; False where the host itself gives no number."""
    if "stock" not in cell or "error8" not in cell:
        return False
    return bool(cell["error8"] > max(SMALL, RATIO * cell["stock"]))


def misses_at_same_sites(cell: Cell) -> bool:
    """Whether they are worse with the host's own sites too, so that placement does not explain it."""
    return misses_stock(cell) and misses_stock({**cell, "error8": cell.get("same_sites", cell["error8"])})


def spread(cells: Iterable[Cell]) -> float | None:
    """Largest over smallest error at 4 bits of a network's rooms; None for fewer than two."""
    errors = [cell["error4"] for cell in cells if "error4" in cell]
    return max(errors) / min(errors) if len(errors) > 1 and min(errors) else None


def broken(cell: Cell, check: str) -> str | None:
    """What is wrong with one check: a text, or None."""
    if check in cell["failed"]:
        return str(cell["failed"][check])
    if cell.get("stopped", {}).get("step") == check:
        return str(cell["stopped"]["why"])
    value = cell.get(check)
    if check in ("batch", "silent"):
        return f"not {', '.join(value)}" if value else None
    if check == "onnxruntime":
        return f"off: {', '.join(value['off'])}" if value and value["off"] else None
    return "differs" if value in (False, "differs") else None


def held(cells: Sequence[Cell], check: str) -> tuple[int, int]:
    """(cells in which a check held, cells in which it ran)."""
    ran = [cell for cell in cells if check in cell or broken(cell, check)]
    return sum(broken(cell, check) is None for cell in ran), len(ran)


def percent(value: float | None) -> str:
    """0.0123 as 1.2; a dash for what is not there."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if value < 1 else f"{100 * value:.0f}"


def cell_text(cell: Cell | None) -> str:
    """What the table says of a cell: sites, error of the host's int8, ours at 8 and at 4 bits in percent."""
    if cell is None:
        return "not run"
    if "error8" not in cell and "error4" not in cell:
        stopped = cell.get("stopped")
        return "failed" if stopped is None else stopped["why"]
    eight = percent(cell.get("error8"))
    if misses_stock(cell):
        eight = f"**{eight}**" + (f" ({percent(cell['same_sites'])})" if "same_sites" in cell else "")
    return f"{cell.get('sites', '–')}: {percent(cell.get('stock'))} / {eight} / {percent(cell.get('error4'))}"


def page(cells: Sequence[Cell], networks: dict[str, Entry]) -> str:
    """docs/zoo.md.

    Args:
        cells: all that are there.
        networks: of the zoo.
    """
    by = {(cell["network"], cell["room"]): cell for cell in cells}
    cells = [by[key] for name in networks for room in ROOMS if (key := (name, room)) in by]
    parts = [_intro(cells, networks), _wanted(cells, networks), _checks(cells)]
    rows = [
        f"| {name} | {entry.family} | {' | '.join(cell_text(by.get((name, room))) for room in ROOMS)} |"
        for name, entry in networks.items()
    ]
    header = f"| network | kind | {' | '.join(ROOMS)} |\n|---|---|{'---|' * len(ROOMS)}"
    explained = (
        "Per cell: sites: error of the host's own int8 / of Direct at 8 bits / of DQA at 4 bits, in percent of the "
        f"output. Bold: more than {RATIO} times the host's, and above {SMALL:.0%}; in parentheses the same with "
        "quantizers at the host's sites only. A dash: that part failed."
    )
    parts.append(f"## Every cell\n\n{explained}\n\n{header}\n" + "\n".join(rows))
    parts += [_floats(cells), _failures(cells)]
    return "\n\n".join(parts) + "\n"


def _intro(cells: Sequence[Cell], networks: dict[str, Entry]) -> str:
    sources = Counter(entry.source for entry in networks.values())
    versions = Counter(cell["code"] for cell in cells)
    listed = ", ".join(f"{count} of {source}" for source, count in sources.most_common())
    return f"""# Networks that others wrote

{len(networks)} architectures ({listed}),
each in FX, PT2E, Brevitas and NNCF by the room's `quantize_model`: random weights from a seed, batch norms settled on
data, inputs of at most 96 pixels, shortened where they are deep.
`python -m examples.zoo` computes what is not there yet, each cell in a process of its own that may take 60 s of
processor time, and `python -m examples.zoo --page` writes this page from `docs/results/zoo.json`. The extra `[zoo]`
has the packages; torchvision beside a CPU build of torch lacks its compiled part, which `examples/zoo/entry.py` copes
with. NNCF compiles its own kernels at first use, for a minute.

{len(cells)} of {len(networks) * len(ROOMS)} cells were run, with these versions of the library:
{", ".join(f"{count} with {version}" for version, count in versions.most_common())}.

The error is that of the output, relative to the float network's, on a batch that calibration did not see (two
batches). The host's own int8: FX with its default mapping, PT2E with torchao's XNNPACKQuantizer
(or X86InductorQuantizer where that fails: it quantizes token ids too), Brevitas' `quantize`
(or `layerwise_quantize` where it cannot trace), `nncf.quantize`. They leave more in float than we do: XNNPACK's
softmax, norms and activation functions, Brevitas' `layerwise_quantize` all but the inputs of layers, NNCF whatever its
patterns for transformers name. torch.fx cannot trace most networks of transformers: FX and Brevitas then get the graph
that TorchDynamo makes of them."""


def _wanted(cells: Sequence[Cell], networks: dict[str, Entry]) -> str:
    lines = []
    for room in ROOMS:
        known = [c for c in cells if c["room"] == room and "stock" in c and "error8" in c]
        missing = [c for c in known if misses_stock(c)]
        left = [c["network"] for c in missing if misses_at_same_sites(c)]
        quantized = sum(c["room"] == room and "error4" in c for c in cells)
        ratios = [c["seconds8"] / c["stock_seconds"] for c in known if c.get("stock_seconds")]
        time = f"{statistics.median(ratios):.1f}" if ratios else "–"
        ours = sum(c["room"] == room for c in cells)
        lines.append(
            f"| {room} | {quantized} of {ours} | {len(known) - len(missing)} of {len(known)} | "
            f"{len(known) - len(left)} of {len(known)} | {time} | {', '.join(left) or 'none'} |"
        )
    spreads = {
        name: found for name in networks if (found := spread([c for c in cells if c["network"] == name])) is not None
    }
    apart = {name: found for name, found in spreads.items() if found > RATIO}
    four = ", ".join(f"{name} ({found:.1f})" for name, found in sorted(apart.items(), key=lambda item: -item[1]))
    return f"""## What was wanted

At 8 bits no more than {RATIO} times the error of the host's own int8, or below {SMALL:.0%}, wherever the host works;
at 4 bits the rooms within {RATIO} times of each other. Hosts quantize fewer tensors than we do: where 8 bits miss, the
host's quantizers of activations are exchanged for ours, one by one, and the error is taken again
(`examples/zoo/same_sites.py`). The time is that of `quantize_model`.

| room | quantized | 8 bits as wanted | or at the host's sites | time over the host's, median | misses that are left |
|---|---|---|---|---|---|
{chr(10).join(lines)}

At 4 bits {len(spreads) - len(apart)} of {len(spreads)} networks are as wanted; apart (largest error over smallest):
{four or "none"}."""


def _checks(cells: Sequence[Cell]) -> str:
    rows = [f"| {text} | {good} of {ran} |" for key, text in CHECKS.items() for good, ran in (held(cells, key),)]
    return "## What holds\n\n| of the network at 4 bits | cells |\n|---|---|\n" + "\n".join(rows)


def _floats(cells: Sequence[Cell]) -> str:
    reasons: Counter[str] = Counter()
    for cell in cells:
        reasons.update(cell.get("floats") or {})
    defaults = sum(cell.get("default_axes", 0) for cell in cells)
    rows = [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    return (
        "## What stays float\n\nTensors and layers over all cells, by the reason that `placement_report` gives. "
        f"{defaults} of {sum(cell.get('sites', 0) for cell in cells)} sites have a channel axis that is only a default."
        "\n\n| reason | count |\n|---|---|\n" + "\n".join(rows)
    )


def _failures(cells: Sequence[Cell]) -> str:
    def listed(steps: Iterable[str]) -> str:
        found = [
            f"- {cell['network']}, {cell['room']}, {step}: {text[:200]}"
            for cell in cells
            for step in steps
            if (text := broken(cell, step)) is not None
        ]
        return "\n".join(found) or "None."

    return (
        f"## Ours\n\nWhere `quantize_model`, or a check of its result, fails or differs.\n\n{listed(OURS)}\n\n"
        f"## The hosts' own\n\nWhere the host's own int8, or tracing for it, fails.\n\n{listed(('trace', 'stock'))}"
    )
