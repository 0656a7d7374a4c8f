"""Figures show the numbers that they are given, say of what, and read in grey; none goes through pyplot."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgb
from matplotlib.text import Text

from freeze_core import (
    AttentionCircuitFreezer,
    ExperimentalInterventions,
    HeadMeasures,
    HeadScores,
    InterventionConfig,
    InterventionError,
    copying_scores,
    run_circuit_ablation_study,
)
from freeze_core.plots import (
    plot_ablation,
    plot_effect_by_strength,
    plot_gradient_flow,
    plot_head_measures,
    plot_head_scores,
    plot_heatmap,
    plot_patterns,
    plot_vector_effect,
)
from freeze_core.plots.gradients import layer_norms
from freeze_core.plots.style import COLOURS, DASHES, MARKERS, share_map, signed_map
from pytest_circuitfreeze.models import tiny_model

FREEZER = AttentionCircuitFreezer()
IDS = torch.arange(12).view(2, 6) * 7 % 97
TOKENS = ["The", " capital", " of", " $France$", "\n", " antidisestablishmentarianism"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_scores(layers: int = 3, heads: int = 4, circuits: tuple[str, ...] = ("qk", "ov"), **fields: Any) -> HeadScores:
    scores = {circuit: drawn(layers, heads, seed=seed) for seed, circuit in enumerate(circuits)}
    scores[circuits[0]][0, 1] = torch.nan
    exact = {circuit: drawn(layers, heads, seed=5) > 1 for circuit in circuits}
    exact[circuits[0]][0, 1] = True  # where there is no head
    return HeadScores(scores, 2.5, fields.pop("metric", "loss"), fields.pop("method", "exact"), 24, exact)


def curves(label: str, *names: str) -> dict[str, list[Any]]:
    strength = [1.0, 0.0, 0.5]  # in whatever order they were measured
    effect = [one * (2 + number) for number, _ in enumerate(names) for one in strength]
    return {
        "strength": strength * len(names),
        "effect": effect,
        "effect_low": [one - 0.1 for one in effect],
        "effect_high": [one + 0.3 for one in effect],
        "n": [16] * len(effect),
        label: [name for name in names for _ in strength],
    }


def patterns(**fields: Any) -> tuple[Any, Any]:
    model = tiny_model("gpt2")
    before = FREEZER.record(model, IDS, pattern=True)
    with FREEZER.freeze_circuits(model, InterventionConfig([1], [2], "qk", strength=0.5)):
        return before, FREEZER.record(model, IDS, pattern=True)


def reports(circuit: str = "both") -> dict[str, dict[str, Any]]:
    model = tiny_model("llama_gqa")
    return {
        mode: FREEZER.check_gradient_behavior(model, IDS, InterventionConfig([1], [0], circuit, backward_mode=mode))
        for mode in ("stopgrad", "ste", "circuit_ste")
    }


def study() -> Any:
    return run_circuit_ablation_study(
        tiny_model("llama_gqa"), IDS.repeat(2, 1), [1], [0], circuits=["qk", "ov"], progress=False, resamples=100
    )


FIGURES: dict[str, Callable[[], Any]] = {
    "scores": lambda: plot_head_scores(head_scores()),
    "scores of one circuit": lambda: plot_head_scores(head_scores(circuits=("z",), metric="logit_difference")),
    "scores of 30 x 9": lambda: plot_head_scores(head_scores(30, 9)),
    "scores of 12 x 12": lambda: plot_head_scores(head_scores(12, 12, method="screened")),
    "scores of 80 x 64": lambda: plot_head_scores(head_scores(80, 64)),
    "patterns": lambda: plot_patterns(*patterns(), TOKENS, layer=1, head=2),
    "patterns of 60": lambda: plot_patterns(
        drawn(60, 60).softmax(-1), drawn(60, 60).softmax(-1), [f" token{number}" for number in range(60)]
    ),
    "patching": lambda: plot_heatmap(
        drawn(30, 25), unit="logit difference restored (share)", n=16, column="position", title="Residual stream"
    ),
    "strength": lambda: plot_effect_by_strength(curves("circuit", "qk", "ov", "both"), unit="change of loss (nats)"),
    "vector": lambda: plot_vector_effect(curves("vector", "found", "random"), unit="logits", title="A vector"),
    "gradients of parameters": lambda: plot_gradient_flow(reports()),
    "gradients of activations": lambda: plot_gradient_flow(reports(), "activations"),
    "ablation": lambda: plot_ablation(study()),
    "copying": lambda: plot_head_measures(copying_scores(tiny_model("llama_gqa"))),
}


def texts(figure: Any) -> list[Any]:
    return [one for one in figure.findobj(Text) if one.get_visible() and one.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_read(name: str) -> None:
    figure = FIGURES[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    words = " ".join(one.get_text() for one in texts(figure))
    assert re.search(r"n = \d+|read off weights", words), words
    for axis in figure.axes:
        if axis.get_subplotspec() is not None and axis.get_subplotspec().colspan.start == 0:
            assert axis.get_xlabel() or axis.get_ylabel()
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [one.get_window_extent(renderer) for one in ticks if one.get_visible() and one.get_text()]
            for one, other in pairwise(boxes):
                assert not one.overlaps(other), [tick.get_text() for tick in ticks]
        for one in (axis.xaxis.label, axis.yaxis.label, axis.title, figure._suptitle):
            if one is not None and one.get_text():
                box = one.get_window_extent(renderer)
                assert box.x0 >= page.x0 - 1, one.get_text()
                assert box.x1 <= page.x1 + 1, one.get_text()
                assert box.y0 >= page.y0 - 1, one.get_text()
                assert box.y1 <= page.y1 + 1, one.get_text()


def test_scores_are_drawn_as_they_are_on_one_symmetric_scale() -> None:
    scores = head_scores(method="screened")
    scores.scores["ov"][2, 3] = 7.0  # more than any is negative
    figure = plot_head_scores(scores)
    qk, ov, bar = figure.axes
    largest = max(float(one.nan_to_num().abs().max()) for one in scores.scores.values())
    for axis, circuit in ((qk, "qk"), (ov, "ov")):
        (image,) = axis.images
        assert np.array_equal(image.get_array().filled(np.nan), scores.scores[circuit], equal_nan=True)
        assert image.get_clim() == (-largest, largest)
        assert axis.get_title() == circuit.upper()
        assert axis.get_xlabel() == "query head"
        (dots,) = axis.collections
        exact = scores.exact[circuit] & ~scores.scores[circuit].isnan()
        assert {(int(y), int(x)) for x, y in dots.get_offsets()} == {(int(y), int(x)) for y, x in exact.nonzero()}
    assert qk.get_ylabel() == "layer"
    assert bar.get_ylabel() == "change of loss (nats/token)\nn = 24 rows"
    assert "dots: exact" in figure.get_suptitle()
    assert "unfrozen loss: 2.5" in figure.get_suptitle()
    assert not plot_head_scores(head_scores()).axes[0].collections
    assert "(bits)" in plot_head_scores(head_scores(metric="mine"), unit="bits").axes[-1].get_ylabel()
    assert plot_head_scores(head_scores(metric="mine")).axes[-1].get_ylabel() == "change of mine\nn = 24 rows"


def test_a_heatmap_of_what_has_no_sign_begins_at_0() -> None:
    figure = plot_heatmap(
        {"a": drawn(2, 3).abs(), "b": torch.zeros(2, 3)}, unit="share", n="n = 3 prompts", rows=["x", "y"]
    )
    assert [axis.images[0].get_clim()[0] for axis in figure.axes[:2]] == [0, 0]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["x", "y"]
    assert figure.get_suptitle() == ""
    zeros = plot_heatmap(torch.full((2, 2), torch.nan), unit="share", n=0, title="Nothing")
    assert zeros.get_suptitle() == "Nothing"
    assert zeros.axes[0].images[0].get_array().mask.all()


def test_patterns_are_drawn_as_they_are() -> None:
    before, after = patterns()
    figure = plot_patterns(before, after, TOKENS, layer=1, head=2, row=1)
    for axis, recorded in zip(figure.axes, (before, after), strict=False):
        assert np.array_equal(axis.images[0].get_array().filled(np.nan), recorded[1].pattern[1, 2].double())
        assert axis.images[0].get_clim() == (0, 1)
        labels = [tick.get_text() for tick in axis.get_xticklabels()]
        assert labels == ["The", "·capital", "·of", r"·\$France\$", "⏎", "·antidisestab…"]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["before", "after"]
    assert "layer 1, head 2" in figure.get_suptitle()
    both_ways = plot_patterns(*[torch.full((3, 3), 1 / 3)] * 2)
    assert both_ways.axes[0].images[0].get_clim() == (0, 1)


def test_of_more_labels_than_there_is_room_for_every_so_many_are_shown_from_the_first_on() -> None:
    labels = [f"token{number}" for number in range(120)]
    for ticks in (plot_heatmap(drawn(120, 2), unit="x", n=1, rows=labels), plot_heatmap(drawn(120, 2), unit="x", n=1)):
        shown = [tick.get_text().removeprefix("token") for tick in ticks.axes[0].get_yticklabels()]
        assert shown[:2] == ["0", "5"]
        assert shown[-1] == "115"


def test_measures_are_drawn_as_they_are() -> None:
    values = {"prefix_matching": drawn(3, 4).sigmoid(), "first_token": drawn(3, 4, seed=1).sigmoid()}
    measures = HeadMeasures(values, 8, "share of attention", "Model: what it is", values, values)
    figure = plot_head_measures(measures)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["prefix matching", "first token"]
    for axis, one in zip(figure.axes, values.values(), strict=False):
        assert np.array_equal(axis.images[0].get_array().filled(np.nan), one)
        assert axis.images[0].get_clim() == (0, 1)
    assert figure.axes[-1].get_ylabel() == "share of attention\nn = 8 sequences"
    assert len(plot_head_measures(measures, ["first_token"]).axes) == 2


@pytest.mark.parametrize("plot", [plot_effect_by_strength, plot_vector_effect])
def test_curves_are_drawn_in_order_of_strength_with_their_bands(plot: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="the extra 'studies' is not installed")
    table = curves("kind", "one", "other")
    table["n"] = [16, 16, 16, 4, 8, 8]
    for given in (table, pandas.DataFrame(table, index=[9, 8, 7, 6, 5, 4])):
        (axis,) = plot(given, unit="change (nats)", label="kind").axes
        lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
        assert list(lines) == ["one (n = 16)", "other (n = 4 to 8)"]
        assert lines["other (n = 4 to 8)"].get_xydata().tolist() == [[0, 0], [0.5, 1.5], [1, 3]]
        for line, band in zip(lines.values(), axis.collections, strict=True):
            assert same_color(band.get_facecolor()[0][:3], line.get_color())
            edges = [one for one in axis.lines if one is not line and one.get_color() == line.get_color()]
            assert {edge.get_linestyle() for edge in edges} == {line.get_linestyle()}
        band = axis.collections[1].get_paths()[0].vertices
        assert {(0.5, 1.4), (0.5, 1.8)} <= {(float(x), round(float(y), 9)) for x, y in band}
        assert axis.get_ylabel() == "change (nats)"
        assert "strength" in axis.get_xlabel()
    del table["kind"]
    assert len(plot(table, unit="x").axes[0].get_legend().get_texts()) == 1


def test_a_vector_is_drawn_from_its_own_effects_and_their_frame() -> None:
    ids = torch.randint(0, 90, (2, 8, 5), generator=torch.Generator().manual_seed(0))
    vector = ExperimentalInterventions().discover_intervention_vector(
        tiny_model("gpt2"), *ids, 1, metric="kl", strengths=(2.0, 1.0), resamples=100, progress=False
    )
    effects = vector.effects
    assert effects is not None
    for given in (effects, effects.to_frame(), vector.to_frame()):
        (axis,) = plot_vector_effect(given).axes
        lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
        assert list(lines) == ["vector (n = 4)", "random vectors (n = 4)"]
        last, first = effects.rows
        for line, name in zip(lines.values(), ("change", "control"), strict=True):
            assert line.get_xydata().tolist() == [[row.strength, getattr(row, name).value] for row in (first, last)]
        assert axis.get_ylabel() == "change of kl (nats/token)"
        assert plot_vector_effect(given, unit="nats").axes[0].get_ylabel() == "nats"
    assert set(effects.to_frame().unit) == {"nats/token"}


def test_gradients_are_those_of_the_reports() -> None:
    made = reports("qk")
    (axis,) = plot_gradient_flow(made, "activations").axes
    by_mode = {line.get_label(): line.get_ydata() for line in axis.lines if line.get_label() in made}
    assert list(by_mode["stopgrad"]) == [0]
    heads = made["circuit_ste"]["sites"]["model.layers.1.self_attn.q_proj"]["heads"]
    heads = heads + made["circuit_ste"]["sites"]["model.layers.1.self_attn.k_proj"]["heads"]
    expected = sum(head["norm"] ** 2 for head in heads if head["frozen"]) ** 0.5
    assert by_mode["circuit_ste"][0] == pytest.approx(expected)
    of_layer = [
        one["norm"] ** 2 for name, one in made["ste"]["parameters"].items() if name.startswith("model.layers.2.")
    ]
    assert layer_norms(made["ste"], "parameters")[2] == pytest.approx(sum(of_layer) ** 0.5)
    assert list(layer_norms(made["ste"], "parameters")) == [0, 1, 2]
    assert axis.get_xlabel() == "layer"
    assert "norm of the loss's gradient" in axis.get_ylabel()


def test_gradients_that_are_all_0_are_drawn() -> None:
    report = FREEZER.check_gradient_behavior(tiny_model("llama_gqa"), IDS, InterventionConfig([1], [0], "qk"))
    (axis,) = plot_gradient_flow({"stopgrad": report}, "activations").axes
    (line,) = [one for one in axis.lines if one.get_label() == "stopgrad"]
    assert list(line.get_ydata()) == [0]
    assert axis.get_ylim()[0] < 0 < axis.get_ylim()[1]


def test_a_study_is_drawn_as_its_table_says() -> None:
    made = study()
    perplexity, _, divergence, effect = plot_ablation(made).axes
    rows = made.rows
    points = [line.get_xydata()[0].tolist() for line in perplexity.lines[1:]]
    assert points == [[row.perplexity.value, place] for place, row in enumerate(rows)]
    assert perplexity.lines[0].get_xdata()[0] == made.clean.perplexity.value
    ends = [collection.get_segments()[0][:, 0].tolist() for collection in divergence.collections]
    assert ends == [[row.kl.low, row.kl.high] for row in rows]
    assert [tick.get_text() for tick in perplexity.get_yticklabels()] == ["qk", "ov"]
    assert perplexity.get_ylim() == (1.5, -0.5)  # from above, as in the table
    assert effect.get_xlabel() == "effect size (d)"
    assert f"n = 4 sequences, {int(made.targets.sum())} tokens" in plot_ablation(made).get_suptitle()


def test_an_infinite_interval_is_an_arrow() -> None:
    made = study()
    row = made.rows[0]
    object.__setattr__(row, "effect_size", row.effect_size._replace(high=np.inf))
    figure = plot_ablation(made)
    effect = figure.axes[3]
    (arrow,) = [line for line in effect.lines if line.get_marker() == ">" and line.get_ydata()[0] == 0]
    assert arrow.get_xdata()[0] == effect.get_xlim()[1]
    bars = [bar for axis in figure.axes for bar in axis.collections]  # to their ends, and to the edge
    assert len({float(bar.get_linewidth()[0]) for bar in bars}) == 1
    assert all(same_color(bar.get_color()[0], arrow.get_color()) for bar in bars)


def test_colours_order_in_grey_and_lines_differ_without_colour() -> None:
    def lightness(colours: Any) -> np.ndarray[Any, Any]:
        return np.asarray(colours)[:, :3] @ [0.299, 0.587, 0.114]

    steps = np.linspace(0, 1, 101)
    assert (np.diff(lightness(signed_map()(steps))) > 0).all()
    assert (np.diff(lightness(share_map()(steps))) < 0).all()
    below, at, above = lightness(signed_map()([0.25, 0.5, 0.75]))
    assert at - below > 0.12
    assert above - at > 0.12
    assert len(set(COLOURS)) == len(set(DASHES)) == len(set(MARKERS)) == len([*map(to_rgb, COLOURS)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_head_scores(3), "scores=3: must be what score_heads returns"),
        (lambda: plot_head_measures(3), "measures=3"),
        (lambda: plot_head_measures(HeadMeasures({"a": drawn(2, 2)}, 0, "x", "y"), ["b"]), "names=.*must be some of a"),
        (lambda: plot_heatmap(drawn(2), unit="x", n=1), r"values is \[2\]: must be of 2 dimensions"),
        (lambda: plot_heatmap({}, unit="x", n=1), "values is empty"),
        (lambda: plot_heatmap(drawn(2, 2), unit="", n=1), "unit='': must be a text"),
        (lambda: plot_heatmap(drawn(2, 2), unit="x", n=-1), "n=-1: must be an int"),
        (lambda: plot_heatmap({"a": drawn(2, 2), "b": drawn(2, 3)}, unit="x", n=1), "must all be of one shape"),
        (lambda: plot_heatmap(drawn(2, 2), unit="x", n=1, rows=["a"]), "rows are 1 labels, for 2 of the values"),
        (lambda: plot_patterns(*patterns(), TOKENS), "layer=None, head=None: must be given with a recording"),
        (lambda: plot_patterns(*patterns(), layer=1, head=4), r"head=4: not in a pattern \[2, 4, 6, 6\]"),
        (lambda: plot_patterns(*[FREEZER.record(tiny_model("gpt2"), IDS)] * 2, layer=1, head=0), "has no patterns"),
        (lambda: plot_effect_by_strength({"strength": [0]}, unit="x"), "table has no column effect"),
        (lambda: plot_effect_by_strength(3, unit="x"), "table has no column strength"),
        (lambda: plot_effect_by_strength({**curves("circuit", "a"), "n": [1]}, unit="x"), "columns of 3 strength"),
        (lambda: plot_effect_by_strength(curves("circuit", *"abcdefg"), unit="x"), "7 lines: must be 6 at most"),
        (lambda: plot_vector_effect(curves("vector", "a")), "unit=None: must be a text"),
        (
            lambda: plot_vector_effect({**curves("vector", "a"), "n": [1, np.nan, 2]}, unit="x"),
            "n=.*: must be over how",
        ),
        (lambda: plot_gradient_flow({}), "reports={}"),
        (lambda: plot_gradient_flow({"ste": {}}), "of='parameters'"),
        (lambda: plot_gradient_flow(reports(), "z"), "of='z': must be one of parameters, activations"),
        (lambda: plot_ablation(3), "study=3"),
    ],
)
def test_bad_input_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        call()


@pytest.mark.parametrize("name", ["matplotlib.figure", "matplotlib.colors"])
def test_without_matplotlib_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"plots are made by matplotlib.*pip install 'pytest-circuitfreeze\[studies\]'"
    ):
        plot_heatmap(drawn(2, 2), unit="x", n=1)


def test_nothing_is_loaded_before_it_is_needed_and_pyplot_never() -> None:
    program = """
import sys, torch, freeze_core, freeze_core.plots
assert not {"matplotlib", "pandas", "scipy"} & sys.modules.keys()
figure = freeze_core.plots.plot_heatmap(torch.ones(2, 3), unit="share", n=1)
figure.savefig(sys.argv[1], format="png")
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, "/dev/null"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
