"""A project's own claims and models: the marker and the hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from tables import table

Run = Callable[..., pytest.RunResult]
ON = ("--circuitfreeze", "--circuitfreeze-arch", "gpt2,llama")
WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
MINE = """
    from types import SimpleNamespace

    import pytest

    @pytest.mark.circuitfreeze
    def test_my_ablation_is_exact(circuit_model, circuit_engine, circuit_record):
        '''My ablation is exact.'''
        circuit_record.observe(SimpleNamespace(error=0.0, bound=0.0))

    @pytest.mark.circuitfreeze
    class TestMine:
        def test_no_model(self): pass

    def test_unmarked(circuit_model): pass
"""


def write(**files: str) -> None:
    for name, text in files.items():
        Path(f"{name}.py").write_text(dedent(text))


@WORKERS
def test_a_marked_test_is_a_claim_of_the_run(stand_in: Run, workers: tuple[str, ...]) -> None:
    # Of the same name as a shipped file, and with --strict-markers.
    write(test_alpha=MINE)
    result = stand_in(*ON, "--strict-markers", "--circuitfreeze-report=out", *workers)
    result.assert_outcomes(passed=11)
    shown = [line.rstrip() for line in table(result)]
    assert shown[shown.index("test_alpha.py") :][:5] == [
        "test_alpha.py",
        "  my ablation is exact   pass   pass       -  exact",
        "  no model                  -      -    pass      -",
        "",
        "5 claims on 2 models: 9 passed; 54 examples",
    ]
    document = json.loads(Path("out/report.json").read_text())
    (mine,) = (entry for entry in document["results"] if entry["id"].endswith("is_exact[llama]"))
    assert (mine["claim"], mine["sentence"], mine["model"], mine["examples"]) == (
        "my_ablation_is_exact",
        "My ablation is exact.",
        "llama",
        1,
    )
    text = Path("out/report.md").read_text()
    assert "## test\\_alpha.py" in text
    assert "| My ablation is exact. | pass" in text


def test_without_the_switch_it_is_a_test_like_any_other(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MINE)
    result = pytester.runpytest_inprocess("--strict-markers", "--circuitfreeze-arch=gpt2", "-k", "no_model")
    result.assert_outcomes(passed=1, deselected=2)
    assert "circuitfreeze:" not in result.stdout.str()


def test_markers_are_documented(pytester: pytest.Pytester) -> None:
    shown = pytester.runpytest_inprocess("--markers").stdout
    shown.fnmatch_lines(["@pytest.mark.circuitfreeze: the test is a claim, named by the first line of its docstring*"])


def test_the_marker_selects_shipped_claims_too(stand_in: Run) -> None:
    write(test_mine=MINE)
    stand_in(*ON, "-m", "circuitfreeze").assert_outcomes(passed=9, deselected=2)


def test_a_marked_test_that_fails_says_how_to_run_it_again(stand_in: Run) -> None:
    write(
        test_mine="""
        import pytest
        from pytest_circuitfreeze.suites.claims import Claim

        @pytest.mark.circuitfreeze
        def test_breaks(circuit_model):
            Claim("Mine holds").demand(circuit_model != "llama", "it does not")
    """
    )
    result = stand_in(*ON, "test_mine.py")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["Mine holds", "  found: it does not", "pytest --circuitfreeze *'test_mine.py::test_breaks?llama?'"]
    )
    assert "  breaks           pass   FAIL      -" in table(result)


MODELS = """
    def pytest_circuitfreeze_models(config):
        return {"mine": lambda: "mine", "second": lambda: "second"}
"""


@WORKERS
def test_a_hook_adds_models(stand_in: Run, workers: tuple[str, ...]) -> None:
    write(conftest=MODELS)
    result = stand_in("--circuitfreeze", "--circuitfreeze-arch=gpt2", "-k", "beta", "circuitfreeze", *workers)
    result.assert_outcomes(passed=3, **({} if workers else {"deselected": 6}))
    assert "                   gpt2   mine  second  bound" in table(result)
    result.stdout.fnmatch_lines(["circuitfreeze: *, engine idle:Engine on gpt2, mine, second; profile*"])


def test_a_factory_of_the_hook_makes_the_model(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        from pytest_circuitfreeze.models import tiny_model

        def broken():
            raise RuntimeError("no data today")

        def pytest_circuitfreeze_models(config):
            return {"mine": lambda: tiny_model("opt"), "broken": broken, "number": lambda: 3}
        """
    )
    pytester.makepyfile("def test_mine(circuit_model): assert circuit_model.config.model_type in ('gpt2', 'opt')")
    result = pytester.runpytest_subprocess("--circuitfreeze-arch=gpt2", "--circuitfreeze-attn=eager")
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "model 'broken' cannot be loaded: RuntimeError: no data today",
            "model 'number' cannot be loaded: the factory gave 3, which is no torch.nn.Module",
        ]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("['mine']", "pytest_circuitfreeze_models gave ['mine']; give a mapping from names to factories*"),
        ("{'mine': 'module:factory'}", "pytest_circuitfreeze_models gave {'mine': 'module:factory'}; give a mapping*"),
        ("{'gpt2': print}", "pytest_circuitfreeze_models: 'gpt2' is already a model of this run"),
    ],
)
def test_a_hook_that_gives_no_models_is_a_usage_error(pytester: pytest.Pytester, given: str, message: str) -> None:
    pytester.makeconftest(f"def pytest_circuitfreeze_models(config): return {given}")
    result = pytester.runpytest_subprocess("--circuitfreeze")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message.replace('[', '[[]')}"])


CLAIMS = """
    def pytest_circuitfreeze_claims(config):
        return ["more.claims"]
"""


@WORKERS
def test_a_hook_adds_claims(stand_in: Run, workers: tuple[str, ...]) -> None:
    write(conftest=CLAIMS)
    Path("more").mkdir()
    write(**{
        "more/__init__": "",
        "more/claims": """
            def test_models_have_short_names(circuit_model):
                '''Models have short names.'''
                length = len(circuit_model)
                assert length < 5
        """,
    })  # fmt: skip
    result = stand_in(*ON, "-v", *workers)
    # Collected by our rules, and with pytest's words for a plain assertion.
    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines(
        ["*circuitfreeze/more.claims::test_models_have_short_names?llama? *", "E *assert 5 < 5"]
    )
    shown = table(result)
    assert shown[shown.index("more.claims") + 1].split() == ["models", "have", "short", "names", "pass", "FAIL", "-"]
    stand_in(*ON, "circuitfreeze/more.claims::test_models_have_short_names[gpt2]", *workers).assert_outcomes(
        passed=1, **({} if workers else {"deselected": 7})
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("'more.claims'", "pytest_circuitfreeze_claims gave 'more.claims'; give a list of names of modules"),
        ("['nowhere']", "pytest_circuitfreeze_claims: 'nowhere' cannot be found; give a module's full name"),
        ("['nowhere.claims']", "pytest_circuitfreeze_claims: 'nowhere.claims' cannot be found: No module*"),
    ],
)
def test_a_hook_that_gives_no_claims_is_a_usage_error(pytester: pytest.Pytester, given: str, message: str) -> None:
    pytester.makeconftest(f"def pytest_circuitfreeze_claims(config): return {given}")
    result = pytester.runpytest_subprocess("--circuitfreeze")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])


def test_small_models_run_in_one_thread(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeconftest(
        """
        import torch
        from contextlib import nullcontext
        from types import SimpleNamespace

        idle = SimpleNamespace(name="idle", freeze=lambda model, config: nullcontext(model))

        class Model(torch.nn.Linear):
            def forward(self, input_ids, **_):
                return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))

        def pytest_circuitfreeze_models(config):
            return {"small": lambda: Model(9, 9), "large": lambda: Model(1000, 1000)}
        """
    )
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.circuitfreeze
        def test_threads(circuit_model):
            assert torch.get_num_threads() == (1 if circuit_model.in_features == 9 else 2)

        def test_afterwards():
            assert torch.get_num_threads() == 2
        """
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (file,) = pytester.path.glob("test_*.py")
    chosen = ("-k", "threads[small] or threads[large] or afterwards", file.name)
    result = pytester.runpytest_subprocess("--circuitfreeze", "--circuitfreeze-engine=conftest:idle", *chosen)
    assert (result.ret, result.parseoutcomes()["passed"]) == (0, 3)
