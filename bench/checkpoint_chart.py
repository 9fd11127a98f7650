# SPDX-License-Identifier: Apache-2.0
"""Draws what checkpoints cost a domain's writes, from the results of case 8.

`python -m bench.checkpoint_chart [RESULTS] [SVG]`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases.checkpoints import ALL, NUMBERS, OURS
from bench.harness import BenchError

HERE = Path(__file__).parent
RESULTS, CHART = HERE / "results.json", HERE.parent / "docs/images/checkpoints.svg"
WIDTH, HEIGHT, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 760, 320, 60, 40, 290, 220
GAP = 370
COLOURS = {OURS: "#1f6f54", ALL: "#b3401f"}

Points = Sequence[tuple[int, float]]


def chart(panels: Mapping[str, Mapping[str, Points]]) -> str:
    """An SVG with a panel for each kind of writes: lines of (checkpoints, microseconds), one for each way."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for number, (title, lines) in enumerate(panels.items()):
        parts += _panel(LEFT + number * GAP, title, lines)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, title: str, lines: Mapping[str, Points]) -> list[str]:
    top = _nice(max(value for points in lines.values() for _, value in points))
    bottom, right = TOP + PLOT_HEIGHT, left + PLOT_WIDTH
    parts = [f'<text x="{left}" y="{TOP - 18}" font-weight="bold">{title}</text>']
    for step in range(5):
        value, y = top * step / 4, bottom - PLOT_HEIGHT * step / 4
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for number in (0, 20, 50, 100):
        x = left + PLOT_WIDTH * number / NUMBERS[-1]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number}</text>')
    middle = left + PLOT_WIDTH / 2
    parts.append(f'<text x="{middle:g}" y="{bottom + 34}" text-anchor="middle">checkpoints</text>')
    for way, points in lines.items():
        places = [(left + PLOT_WIDTH * n / NUMBERS[-1], bottom - PLOT_HEIGHT * value / top) for n, value in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[way]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[way]}"/>' for x, y in places]
        x, y = places[-1]
        parts.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="end" fill="{COLOURS[way]}">{way}</text>')
    return parts


def _nice(value: float) -> float:
    """A round number above: the axis ends there."""
    scale: float = 1
    while value > scale * 10:
        scale *= 10
    return next(step * scale for step in (1, 2, 4, 6, 8, 10) if value <= step * scale)


def panels_of(results: Mapping[str, Any]) -> dict[str, dict[str, Points]]:
    """What there is to draw; BenchError without case 8."""
    found = {
        f"QEMU's processor time for a write of {size}, us": row["more"]["us_per_write"]
        for size in ("4 KiB", "64 KiB")
        for row in results["cases"]
        if row["case"] == f"8 100 checkpoints, {size}" and "more" in row
    }
    if not found:
        raise BenchError("the results have no case 8: make bench CASE=8")
    return found


def main() -> None:
    """The command."""
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else CHART
    where.parent.mkdir(exist_ok=True)
    where.write_text(chart(panels_of(json.loads(results.read_text()))), encoding="utf-8")


if __name__ == "__main__":
    main()
