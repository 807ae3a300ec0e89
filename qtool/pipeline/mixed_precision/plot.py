"""The front of best choices, drawn: in the terminal, and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLUMNS, ROWS = 60, 14
WIDTH, HEIGHT, MARGIN = 720, 420, 64


@dataclass(frozen=True)
class Curve:
    """Points of rising cost, and one of them that was chosen.

    Args:
        points: (cost, SQNR in dB).
        chosen: which was taken, among the points or not.
        x_label, y_label: of the axes.
    """

    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float]
    x_label: str
    y_label: str

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """Smallest and largest x, smallest and largest y; never the same."""
        xs, ys = zip(*self.points, self.chosen, strict=True)
        x_room, y_room = (0.0 if max(v) > min(v) else 0.5 for v in (xs, ys))
        return min(xs) - x_room, max(xs) + x_room, min(ys) - y_room, max(ys) + y_room

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """A point in the unit square, y upwards."""
        x_min, x_max, y_min, y_max = self.limits
        return (point[0] - x_min) / (x_max - x_min), (point[1] - y_min) / (y_max - y_min)


def as_text(curve: Curve) -> str:
    """The curve in characters; the chosen point is an O."""
    grid = [[" "] * COLUMNS for _ in range(ROWS)]
    for point, mark in (*((p, "·") for p in curve.points), (curve.chosen, "O")):
        x, y = curve.place(point)
        grid[ROWS - 1 - round(y * (ROWS - 1))][round(x * (COLUMNS - 1))] = mark
    x_min, x_max, y_min, y_max = curve.limits
    labels = [f"{y_max:.1f}", *[""] * (ROWS - 2), f"{y_min:.1f}"]
    wide = max(map(len, labels))
    lines = [f"{label:>{wide}} │{''.join(row)}".rstrip() for label, row in zip(labels, grid, strict=True)]
    ends = f"{x_min:.3g}{f'{x_max:.3g}':>{COLUMNS - len(f'{x_min:.3g}')}}"
    return "\n".join(
        [
            curve.y_label,
            *lines,
            f"{'':>{wide}} └{'─' * COLUMNS}",
            f"{'':>{wide}}  {ends}",
            f"{'':>{wide}}  {curve.x_label}",
        ]
    )


def as_svg(curve: Curve) -> str:
    """The curve as the text of an SVG file."""
    inner = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = curve.place(point)
        return MARGIN + x * inner[0], HEIGHT - MARGIN - y * inner[1]

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, curve.points))
    x_min, x_max, y_min, y_max = curve.limits
    left, bottom, right, top = MARGIN, HEIGHT - MARGIN, WIDTH - MARGIN, MARGIN
    dots = "\n".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(at, curve.points))
    x, y = at(curve.chosen)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
font-family="sans-serif" font-size="13">
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>
<polyline points="{line}" fill="none" stroke="steelblue" stroke-width="1.5"/>
<g fill="steelblue">
{dots}
</g>
<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="crimson" stroke-width="2"/>
<text x="{left}" y="{bottom + 20}">{x_min:.3g}</text>
<text x="{right}" y="{bottom + 20}" text-anchor="end">{x_max:.3g}</text>
<text x="{WIDTH / 2}" y="{bottom + 40}" text-anchor="middle">{escape(curve.x_label)}</text>
<text x="{left - 8}" y="{bottom}" text-anchor="end">{y_min:.1f}</text>
<text x="{left - 8}" y="{top + 10}" text-anchor="end">{y_max:.1f}</text>
<text x="{left}" y="{top - 16}">{escape(curve.y_label)}</text>
</svg>
"""
