# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.chart`: what bench/results.json says, as a table in docs/performance.md and a chart beside it.

Each bar is ours to a peer, on a logarithmic scale: left of the line at 1 ours is ahead; the mark is the target.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.__main__ import HERE, RESULTS

PAGE = HERE.parent / "docs" / "performance.md"
CHART = HERE.parent / "docs/images/against-others.svg"
BEGIN, END = "<!-- bench.chart: begin -->\n", "<!-- bench.chart: end -->\n"
WIDTH, LABELS, ROW, TOP = 840, 410, 22, 30
#: The least and the greatest ratio drawn.
LEAST, MOST = 0.01, 10.0
#: What is compared, where it is not the time from start to end.
FIGURES = {
    "us_per_write": "a write",
    "p99_us": "99th percentile of a write",
    "scratch_mib": "scratch",
    "first_output": "first output",
    "known_read": "16 MiB read",
    "cpu": "processor time",
}
GOOD, MISSED = "#2a7f62", "#b5482f"


def missed(row: dict[str, Any]) -> bool:
    """Whether a ratio is above its target."""
    return bool(row["ratio"] > row["target"])


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """The SVG."""
    height = TOP + ROW * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for tick in (0.01, 0.1, 1, 10):
        x, strong = _place(tick), tick == 1
        stroke = "#333333" if strong else "#cccccc"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - 6}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP - 10}" text-anchor="middle">{tick:g}</text>')
    for number, row in enumerate(rows):
        parts += _bar(row, TOP + ROW * number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(ratio: float) -> float:
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LABELS + share * (WIDTH - LABELS - 20)


def _bar(row: dict[str, Any], y: int) -> list[str]:
    one, end, target = _place(1), _place(row["ratio"]), _place(row["target"])
    colour = MISSED if missed(row) else GOOD
    text = f"{row['case']}, {against(row)}"
    return [
        f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(text)}</text>',
        f'<rect x="{min(one, end):.1f}" y="{y + 4}" width="{abs(one - end):.1f}" height="{ROW - 9}" fill="{colour}"/>',
        f'<rect x="{target - 1:.1f}" y="{y + 1}" width="2" height="{ROW - 3}" fill="#333333"/>',
    ]


def against(row: dict[str, Any]) -> str:
    """The peer, and what is compared unless that is the time."""
    what = FIGURES.get(row["figure"], "")
    return f"{row['peer']}, {what}" if what and not row.get("limit") else str(row["peer"])


def amount(value: float, figure: str) -> str:
    """A figure for people."""
    if figure.endswith("_mib"):
        return f"{value:.0f} MiB"
    if figure.startswith("us_") or figure.endswith("_us"):
        return f"{value:.0f} us"
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def table(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['QEMU']};"
        f" {machine['restic']}; {machine['borg']}; {machine['nbdcopy']}; {machine['date']}.",
        "",
        "| case | against | ours | theirs | ratio | target | processor | QEMU's | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"**{row['ratio']:.2f}**" if missed(row) else f"{row['ratio']:.2f}"
        figure = row["figure"]
        own = [
            f"{row[name]:.{digits}f} {unit}" if row[name] else ""
            for name, digits, unit in (("cpu_s", 2, "s"), ("qemu_cpu_s", 2, "s"), ("peak_mib", 0, "MiB"))
        ]
        lines.append(
            f"| {row['case']} | {against(row)} | {amount(row['ours_s'], figure)} | {amount(row['peer_s'], figure)}"
            f" | {ratio} | {round(row['target'], 2):g} | {' | '.join(own)} |"
        )
    return "\n".join(lines) + "\n"


def put(page: str, between: str) -> str:
    """The page with this between the two marks; ValueError when they are not there."""
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:begin] + between + page[end:]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--chart", type=Path, default=CHART)
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    rows = [row for row in results["cases"] if row.get("ratio") is not None]
    given.chart.parent.mkdir(exist_ok=True)
    given.chart.write_text(chart(rows))
    image = f"![Ours to theirs; left of 1 ours is ahead, the marks are targets](images/{given.chart.name})\n\n"
    given.page.write_text(put(given.page.read_text(), image + table(results["machine"], rows)))


if __name__ == "__main__":
    main()
