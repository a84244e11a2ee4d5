"""Plot the curves of a run as one PNG: losses, learning rates, gradient norm and throughput over optimizer steps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import ConfigError, DataError
from model.files.untrusted import Json
from tools.cli import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]


def read_metrics(folder: Path) -> list[Json]:
    """Read the lines of metrics.jsonl; a last line that a running or killed process has not finished is left out.

    Raises ConfigError if the file cannot be read or holds no step, DataError for a line that is no metrics.
    """
    file = folder / "metrics.jsonl"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; name the output_dir of a run that has trained") from error
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            value = json.loads(line)
            lines.append({"step": int(value["step"]), **value})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file.name}:{number}: is no line of metrics: {error}; the file was changed by hand") from error
    if not lines:
        raise ConfigError(f"{file} holds no logged step yet")
    return lines


def curve(lines: list[Json], key: str) -> Curve:
    """Return steps and values of `key`, where it was logged as a finite number; JSON has null for the others."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def matching(lines: list[Json], prefix: str, suffix: str = "") -> dict[str, str]:
    """Return the keys that begin with `prefix` and end with `suffix`, by the text in between, in the order of their first log."""
    keys = dict.fromkeys(key for line in lines for key in line)
    between = {key: key[len(prefix) : len(key) - len(suffix)] for key in keys if key.startswith(prefix) and key.endswith(suffix)}
    return {name: key for key, name in between.items() if name}


def draw_losses(axes: Axes, lines: list[Json]) -> None:
    """Draw training and validation loss, and each source by itself where there are several."""
    for kind, colour, style in (("train", "tab:blue", "-"), ("val", "tab:orange", "o-")):
        steps, values = curve(lines, f"{kind}/loss")
        if steps:
            axes.plot(steps, values, style, color=colour, label=f"{kind}, last {values[-1]:.4g}", zorder=3, markersize=4)
        sources = matching(lines, f"{kind}/", "/loss")
        for name, key in sources.items() if len(sources) > 1 else ():
            axes.plot(
                *curve(lines, key), linewidth=1, alpha=0.7, linestyle="-" if kind == "train" else "--", label=f"{kind} {name}"
            )
    axes.set(title="loss", ylim=(0, None))
    axes.legend(fontsize="small")


def draw_rates(axes: Axes, lines: list[Json]) -> None:
    groups: dict[tuple[float, ...], list[str]] = {}
    for part, key in matching(lines, "train/lr/").items():
        groups.setdefault(tuple(curve(lines, key)[1]), []).append(part)
    for parts in groups.values():  # parts with the same rate share a line, else the last drawn would hide the others
        axes.plot(*curve(lines, f"train/lr/{parts[0]}"), label=", ".join(parts))
    axes.set(title="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.legend(fontsize="small")


def draw_one(axes: Axes, lines: list[Json], key: str, title: str) -> None:
    steps, values = curve(lines, key)
    axes.plot(steps, values, color="tab:blue", marker="o" if len(steps) == 1 else None)
    axes.set(title=title, ylim=(0, None))


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches. Raises `ConfigError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib, the extra `plot`: pip install -e '.[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot(folder: Path, out: Path) -> None:
    figure, lines = empty_figure(11, 7), read_metrics(folder)
    (losses, rates), (norm, speed) = figure.subplots(2, 2, sharex=True)
    draw_losses(losses, lines)
    draw_rates(rates, lines)
    draw_one(norm, lines, "train/grad_norm", "gradient norm, before clipping")
    draw_one(speed, lines, "perf/tokens_per_second", "tokens per second, all ranks")
    for axes in (losses, rates, norm, speed):
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (norm, speed):
        axes.set_xlabel("optimizer steps")
    figure.suptitle(f"{folder.resolve().name}, {lines[-1]['step']} steps")
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.plot_run", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run; it may still be going")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the PNG to write; default: RUN/curves.png")
    options = parser.parse_args(argv)
    out = options.out or options.run / "curves.png"

    def action() -> None:
        plot(options.run, out)
        print(out)

    return run_command("plot_run", action)


if __name__ == "__main__":
    raise SystemExit(main())
