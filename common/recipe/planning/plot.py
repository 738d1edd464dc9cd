"""Plots of throughput against interactivity: characters for a terminal, PNG where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fourfold.common.errors import FourfoldError

X, Y = "tokens/s/user", "total tokens/s/GPU"
MARKS = ".O+x#"
Series = Mapping[str, Sequence[tuple[float, float]]]  # name to (tokens/s/user, total tokens/s/GPU)


def text_plot(series: Series, width: int = 64, height: int = 16) -> list[str]:
    """Lines of a scatter plot; later series are drawn on top."""
    marks = dict(zip(series, MARKS, strict=False))
    points = [point for values in series.values() for point in values]
    if not points:
        return ["nothing to draw"]
    right, top = max(x for x, _ in points) * 1.02, max(y for _, y in points) * 1.02
    cells = [[" "] * width for _ in range(height)]
    for name, values in series.items():
        for x, y in values:
            cells[height - 1 - int(y / top * height)][int(x / right * width)] = marks[name]
    label = len(f"{top:,.0f}")
    out = [f"{Y} ({', '.join(f'{marks[name]} {name}' for name in series)})"]
    for row, cell in enumerate(cells):
        value = top * (height - row - 0.5) / height
        out.append(f"{value:{label},.0f} |{''.join(cell)}".rstrip())
    out.append(" " * label + " +" + "-" * width)
    ticks = [f"{right * part:,.0f}" for part in (0, 0.25, 0.5, 0.75, 1)]
    axis = [" "] * (width + 8)
    for part, mark in zip((0, 0.25, 0.5, 0.75, 1), ticks, strict=True):
        start = min(int(part * width), width + 8 - len(mark))
        axis[start : start + len(mark)] = mark
    out.append(" " * (label + 2) + "".join(axis).rstrip() + f"  {X}")
    return out


def png_plot(series: Series, path: Path, title: str) -> None:
    """Write a PNG.

    Raises:
        FourfoldError: matplotlib is not installed, or ``path`` cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise FourfoldError(f"--plot {path}: expected a file that ends in .png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FourfoldError("--plot needs the package matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in series.items():
        style = "o-" if name.startswith("predicted") else "k^"
        axes.plot([x for x, _ in values], [y for _, y in values], style, label=name, markersize=4)
    axes.set(xlabel=X, ylabel=Y, title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise FourfoldError(f"--plot {path}: {error.strerror or error}") from None
