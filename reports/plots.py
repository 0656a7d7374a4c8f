"""Plots of a report, for people who have matplotlib: how close claims came to their bounds, and what a freeze costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from pytest_circuitfreeze import matrix
from pytest_circuitfreeze.benchmarks import Benchmark
from pytest_circuitfreeze.reports.document import Report
from pytest_circuitfreeze.results import WITHOUT_MODEL, Result, used

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRA = "pip install 'pytest-circuitfreeze[studies]'"
NAMES = ("bounds", "benchmarks")
KINDS = ("svg", "png")
LONGEST = 60
"""Letters of a name."""
THEMES = {"light": ["default"], "dark": ["default", "dark_background"]}
"""matplotlib's style sheets; the first undoes what a user's settings say."""
DRAWN = {
    "svg.hashsalt": "circuitfreeze",  # the same report gives the same file
    "svg.fonttype": "path",  # a font that the reader lacks does not matter
    "text.parse_math": False,  # a dollar sign in a name is one
    "font.size": 9.0,
    "savefig.dpi": 150,
}


def available() -> bool:
    """Whether plots can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401 - found out, not used
    except ImportError:
        return False
    return True


def draw(report: Report, theme: str = "light") -> dict[str, dict[str, bytes]]:
    """By the name of a plot its files by format, ``svg`` and ``png``; none of what the report has nothing of."""
    return _drawn(theme, {"bounds": lambda: _bounds(report), "benchmarks": lambda: _costs(report.benchmarks)})


def draw_benchmarks(benchmarks: Sequence[Benchmark]) -> bytes:
    """What each contender costs, as SVG."""
    return _drawn("light", {"benchmarks": lambda: _costs(benchmarks)})["benchmarks"]["svg"]


def _drawn(theme: str, makers: Mapping[str, Callable[[], Figure | None]]) -> dict[str, dict[str, bytes]]:
    from matplotlib import style

    with style.context([*THEMES[theme], DRAWN]), warnings.catch_warnings():
        # A letter of a name that the font lacks is a box; where warnings are errors, it would be no plot.
        warnings.simplefilter("ignore", UserWarning)
        made = {name: make() for name, make in makers.items()}
        return {name: _files(figure) for name, figure in made.items() if figure is not None}


def _files(figure: Figure) -> dict[str, bytes]:
    found = {}
    for kind in KINDS:
        buffer = BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)
        found[kind] = buffer.getvalue()
    return found


def _bounds(report: Report) -> Figure | None:
    """Claims by models: the share of its bound that the largest error used, of those that are not bit for bit."""
    from matplotlib.figure import Figure

    models = matrix.columns(report.results, report.targets)
    rows: dict[str, list[float]] = {}
    for row in matrix.rows(report.results, models):
        shares = [_share(report.results, row, model) for model in models]
        if not all(map(isnan, shares)):
            rows[matrix.words(row.claim)] = shares
    if not rows:
        return None
    figure = Figure(figsize=(3.6 + 0.62 * len(models), 1.6 + 0.26 * len(rows)))
    axes = figure.subplots()
    image = axes.imshow(list(rows.values()), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_yticks(range(len(rows)), map(_label, rows))
    axes.set_xticks(range(len(models)), map(_label, models), rotation=45, ha="right", rotation_mode="anchor")
    for y, shares in enumerate(rows.values()):
        for x, share in enumerate(shares):
            if not isnan(share):
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color="black" if share > 60 else "white")
    examples = sum(result.examples for result in report.results)
    figure.colorbar(image, ax=axes, label="largest error, % of its bound")
    axes.set_title(f"{report.settings['engine']}: how close to its bound\n{examples:,} examples")
    return figure


def _share(results: tuple[Result, ...], row: matrix.Row, model: str) -> float:
    """The largest share of a bound on one model, in %; nan where all was bit for bit, or failed."""
    own = [one for one in results if (one.file, one.claim, one.model or WITHOUT_MODEL) == (row.file, row.claim, model)]
    held = [one for one in own if one.outcome == "passed" and one.bound > 0]
    return max((100 * used(one.error, one.bound) for one in held), default=nan)


def _costs(benchmarks: Sequence[Benchmark]) -> Figure | None:
    """A panel a group: each contender's median with its quartiles, and the target as a line across."""
    from matplotlib.figure import Figure

    if not benchmarks:
        return None
    groups = list(dict.fromkeys(one["group"] for one in benchmarks))
    sizes = [sum(len(one["ratios"]) + 1 for one in benchmarks if one["group"] == group) for group in groups]
    figure = Figure(figsize=(6.0, 0.8 * len(groups) + 0.17 * sum(sizes)))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=sizes, gridspec_kw={"hspace": 0.4})[:, 0]
    for group, axes in zip(groups, panels, strict=True):
        own = [one for one in benchmarks if one["group"] == group]
        _panel(axes, own)
        axes.set_title(group, loc="left")
        once = all(found["n"] == 1 for one in own for found in one["ratios"].values())
        axes.set_xlabel("a count, or a share of the parameters" if once else "ratio of time: median and quartiles")
    return figure


def _panel(axes: Any, own: list[Any]) -> None:
    """Rows downwards, each contender with a mark of its own, so that it is told apart in grey, too."""
    names = list(dict.fromkeys(name for one in own for name in one["ratios"]))
    at, ticks = 0.0, {}
    for one in own:
        start = at
        for name, found in one["ratios"].items():
            number = names.index(name)
            spread = [[found["median"] - found["low"]], [found["high"] - found["median"]]]
            mark = {"fmt": "os^Dv<>PX*"[number % 10], "color": f"C{number}", "markersize": 4}
            axes.errorbar([found["median"]], [at], xerr=spread, label=name, capsize=2, **mark)
            at += 1
        if one["target"] is not None:
            axes.vlines(one["target"], start - 0.4, at - 0.6, linestyles="dashed", label="at most")
        ticks[(start + at - 1) / 2] = f"{_label(one['row'])}, n={max(found['n'] for found in one['ratios'].values())}"
        at += 1
    axes.set_yticks(list(ticks), ticks.values())
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _label(text: str) -> str:
    """A name that leaves room for what it is the name of."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
