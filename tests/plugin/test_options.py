"""Options: their help, their ini twins, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pytest_circuitfreeze.architectures import model_types
from pytest_circuitfreeze.engines import BUILT_IN
from pytest_circuitfreeze.models import TINY
from pytest_circuitfreeze.options import OPTIONS

Run = Callable[..., pytest.RunResult]
BAD = {
    "arch": ["nope", "gpt2,nope", "gpt2,gpt2", "", "all,gpt2"],
    "model": [""],
    "engine": ["nope", "", "a b:c"],
    "profile": ["fast", ""],
    "seed": ["-1", "1.5", "x", "4294967296", ""],
    "device": ["gpu", "cuda:", ""],
    "dtype": ["int8", "torch.float32"],
    "attn": ["flash"],
    "report": ["", "taken.txt", "x" * 300],
    "bench-limit": ["", "fast", "0", "-1", "nan", "inf"],
}


def test_help_lists_every_option(pytester: pytest.Pytester) -> None:
    shown = pytester.runpytest_inprocess("--help").stdout.str()
    for option in OPTIONS:
        assert f"  {option.flag}" in shown
        assert f"  {option.ini} (" in shown


CASES = [(word, value) for word, values in BAD.items() for value in values]


@pytest.mark.parametrize(("word", "value"), CASES)
def test_bad_value_on_the_command_line_is_a_usage_error(pytester: pytest.Pytester, word: str, value: str) -> None:
    pytester.path.joinpath("taken.txt").touch()
    result = pytester.runpytest_inprocess("--circuitfreeze", f"--circuitfreeze-{word}={value}")
    assert_refused(result, f"--circuitfreeze-{word}", value)


# An empty list in an ini file is an empty list, and no mistake.
@pytest.mark.parametrize(("word", "value"), [case for case in CASES if case != ("model", "")])
def test_bad_value_in_the_ini_file_is_a_usage_error(pytester: pytest.Pytester, word: str, value: str) -> None:
    pytester.path.joinpath("taken.txt").touch()
    name = f"circuitfreeze_{word.replace('-', '_')}"
    pytester.makeini(f"[pytest]\n{name} = {value}")
    assert_refused(pytester.runpytest_inprocess("--circuitfreeze"), f"{name} (ini file)", value)


def assert_refused(result: pytest.RunResult, named: str, value: str) -> None:
    """One line that names the option and the part of the value that is wrong."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    wrong = {"gpt2,nope": "nope", "gpt2,gpt2": "gpt2", "all,gpt2": "all"}.get(value, value)
    (message,) = result.stderr.str().strip().splitlines()
    assert message.startswith(f"ERROR: {named}: {wrong!r} ")


def test_message_says_what_is_allowed(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--circuitfreeze", "--circuitfreeze-arch", "gpt3")
    result.stderr.fnmatch_lines(
        ["*'gpt3' is no tiny architecture; choose from gpt2, *falcon_mqa*, a causal *, or 'all' alone"]
    )


def test_ini_file_gives_defaults_and_the_command_line_wins(stand_in: Run) -> None:
    Path("pytest.ini").write_text("[pytest]\ncircuitfreeze = true\ncircuitfreeze_arch = llama\ncircuitfreeze_seed = 7")
    result = stand_in("--collect-only", "--circuitfreeze-seed", "8", "circuitfreeze")
    result.stdout.fnmatch_lines(
        ["circuitfreeze: *, engine idle:Engine on llama; profile standard, seed 8; cpu; torch *"]
    )


@pytest.mark.parametrize("flag", ["--circuitfreeze-bench", "--circuitfreeze-report=out"])
def test_options_of_the_suites_need_the_switch(pytester: pytest.Pytester, flag: str) -> None:
    result = pytester.runpytest_inprocess(flag)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: {flag.partition('=')[0]} is about the shipped suites; give --circuitfreeze too"]
    )


def test_limit_of_benchmarks_that_do_not_run_is_refused(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--circuitfreeze", "--circuitfreeze-bench-limit=1.2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--circuitfreeze-bench-limit is about the benchmarks; give --circuitfreeze-bench *"])


def test_list_shows_what_there_is_and_runs_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("raise SystemExit('collected')")
    result = pytester.runpytest_subprocess("--circuitfreeze-list")
    assert result.ret == 0
    shown = " ".join(result.stdout.str().split())
    for found in (*TINY, *model_types(), *BUILT_IN, "qk_leaves_ov: Freezing QK leaves values, and"):
        assert found in shown
    assert "collected" not in shown


def test_model_and_architecture_of_one_name_are_refused(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--circuitfreeze", "--circuitfreeze-model", "gpt2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --circuitfreeze-model: 'gpt2' is already a tiny architecture of this run"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "no:benchmark"), "*needs the plugin pytest-benchmark, which is not loaded"),
        (("-n", "2"), "*measures in one process; leave out -n"),
    ],
)
def test_benchmarks_that_would_not_measure_are_refused(
    pytester: pytest.Pytester, arguments: tuple[str, ...], message: str
) -> None:
    result = pytester.runpytest_subprocess("--circuitfreeze", "--circuitfreeze-bench", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device and may have the kernel")
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("device", "cuda", "'cuda' is not available here (*); choose from cpu*"),
        ("device", "cuda:7", "'cuda:7' is not available here (*); choose from cpu*"),
        ("attn", "flash_attention_2", "'flash_attention_2' is not available here: *; choose from eager, sdpa*"),
    ],
)
def test_what_this_machine_lacks_is_a_usage_error(
    pytester: pytest.Pytester, flag: str, value: str, message: str
) -> None:
    result = pytester.runpytest_subprocess("--circuitfreeze", f"--circuitfreeze-{flag}", value, "circuitfreeze")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --circuitfreeze-{flag}: {message}"])
    assert "collected" not in result.stdout.str()
