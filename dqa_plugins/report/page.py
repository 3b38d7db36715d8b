"""`ActivationReport.write_html`: one page that needs no network, in light and dark."""

from __future__ import annotations

import html
from pathlib import Path

from dqa_plugins._version import __version__

from .measured import Histogram, SiteReport

_WIDTH, _HEIGHT = 1080, 130

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --bar: #4c78a8; --grid: #e4572e;
  --kept: #2a9d8f; --paper: #ffffff; --head: #f3f5f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --bar: #6ca0dc;
  --grid: #ff8a65; --kept: #66d1c1; --paper: #0d1117; --head: #161b22; } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem } p, small { color: var(--soft) }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap } th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {
  text-align: left } th { background: var(--head); cursor: pointer; position: sticky; top: 0 }
th[aria-sort=ascending]::after { content: " \\25b2" } th[aria-sort=descending]::after { content: " \\25bc" }
details { border-bottom: 1px solid var(--line); padding: .4rem 0 } summary { cursor: pointer } a { color: inherit }
svg { max-width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px }
.bar { fill: var(--bar) } .grid { stroke: var(--grid) } .kept { stroke: var(--kept); stroke-dasharray: 4 3 }
.axis { stroke: var(--line) } .scroll { overflow-x: auto }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) table.querySelectorAll("th").forEach((head, column) => {
  head.tabIndex = 0;
  const sort = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], [n, m] = [Number(x), Number(y)];
      return (isNaN(n) || isNaN(m) ? x.localeCompare(y, undefined, {numeric: true}) : n - m) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
const open = () => { const site = document.getElementById(location.hash.slice(1)); if (site) site.open = true; };
addEventListener("hashchange", open);
open();
"""


def write_page(sites: list[SiteReport], bits: float, path: Path, sensitivity: dict[str, float]) -> Path:
    """Write the page of a report. Arguments as of `ActivationReport.write_html`; `bits` per activation."""
    columns = ["site", "method", "values", "bits", "SQNR dB", "density", "saturated", "important channels"]
    columns += ["error alone"] if sensitivity else []
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    body = "".join(_row(k, site, sensitivity) for k, site in enumerate(sites))
    values = sum(site.elements for site in sites)
    details = "".join(_details(k, site) for k, site in enumerate(sites))
    text = f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>Activations: {bits:.2f} bits</title><style>{_STYLE}</style>
<h1>{bits:.3f} bits per activation</h1>
<p>{len(sites)} quantized tensors, {values:,} values per sample; fixed-length codes with all side information.
Click a heading to sort, a site to see where its values lie.</p>
<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<h2>Sites</h2>{details}
<p><small>dqa-plugins {__version__}. SQNR: signal to quantization noise. Density: share kept in float. Saturated: share
that the clamp moved by more than a step. Error alone: relative error of the outputs when this site alone is quantized.
Pictures: lines are the ends of the grid, ticks its steps, dashed lines the thresholds beyond which values stay float.
</small></p>
<script>{_SCRIPT}</script></html>
"""
    path.write_text(text, encoding="utf-8")
    return path


def _row(number: int, site: SiteReport, sensitivity: dict[str, float]) -> str:
    cells = [
        (f"<a href=#s{number}>{html.escape(site.site)}</a>", site.site),
        (html.escape(site.settings or site.method), site.settings),
        (f"{site.elements:,}", site.elements),
        (f"{site.bits:.2f}", site.bits),
        (f"{site.sqnr:.1f}", site.sqnr),
        (f"{site.density:.2%}", site.density),
        (f"{site.saturated:.2%}", site.saturated),
        (str(len(site.important)), len(site.important)),
    ]
    if sensitivity:
        error = sensitivity.get(site.site)
        cells.append(("" if error is None else f"{error:.2%}", -1 if error is None else error))
    return "<tr>" + "".join(f'<td data-value="{html.escape(str(key))}">{text}</td>' for text, key in cells) + "</tr>"


def _details(number: int, site: SiteReport) -> str:
    channels = ", ".join(map(str, site.important[:64])) + (", ..." if len(site.important) > 64 else "")
    lines = [f"<p>{html.escape(site.settings)}</p>", _picture(site.histogram) if site.histogram else ""]
    lines += [f"<p>important channels: {channels}</p>"] if channels else []
    title = f"{html.escape(site.site)} <small>{site.bits:.2f} bits, {site.sqnr:.1f} dB</small>"
    return f"<details id=s{number} {'open' if number == 0 else ''}><summary>{title}</summary>{''.join(lines)}</details>"


def _picture(histogram: Histogram) -> str:
    """The histogram as SVG, with the ends of the grid and, where they fit, its steps; thresholds dashed."""
    low, high = histogram.low, histogram.high
    first, last = min(low, histogram.represented[0]), max(high, histogram.represented[1])
    span = max(last - first, 1e-30)

    def at(value: float) -> float:
        return 10 + (value - first) / span * (_WIDTH - 20)

    def line(value: float, kind: str, top: float = 0, bottom: float = _HEIGHT) -> str:
        return f'<line class={kind} x1="{at(value):.1f}" x2="{at(value):.1f}" y1="{top}" y2="{bottom}"/>'

    largest, count = max(*histogram.counts, 1), len(histogram.counts)
    width = (high - low) / span * (_WIDTH - 20) / count
    bars = []
    for k, number in enumerate(histogram.counts):
        height = (number / largest) ** 0.5 * (_HEIGHT - 10)
        x = at(low + (high - low) * k / count)
        bars.append(
            f'<rect class=bar x="{x:.1f}" y="{_HEIGHT - height:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{height:.1f}"/>'
        )
    lines = [line(value, "grid") for value in histogram.represented]
    steps = (histogram.represented[1] - histogram.represented[0]) / histogram.step if histogram.step > 0 else 0
    if 0 < steps <= 64:
        levels = [histogram.represented[0] + k * histogram.step for k in range(round(steps) + 1)]
        lines += [line(value, "grid", _HEIGHT, _HEIGHT + 6) for value in levels]
    lines += [line(value, "kept") for value in histogram.thresholds or ()]
    labels = [
        f'<text x="10" y="{_HEIGHT + 19}">{first:.4g}</text>',
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT + 19}" text-anchor=end>{last:.4g}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 19}" text-anchor=middle>smallest step {histogram.step:.4g}; '
        "heights are square roots</text>",
    ]
    axis = f'<line class=axis x1="10" x2="{_WIDTH - 10}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
    ends = histogram.represented
    label = f"values from {low:.4g} to {high:.4g}, grid from {ends[0]:.4g} to {ends[1]:.4g}"
    parts = "".join([axis, *bars, *lines, *labels])
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 24}" role=img aria-label="{label}">{parts}</svg>'
