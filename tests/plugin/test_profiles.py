"""Profiles: how many examples, and which: by the seed that is given, or by a new one that is printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., pytest.RunResult]
DRAWS = """
    from pathlib import Path

    from hypothesis import given, settings, strategies

    @settings(settings.get_profile("circuitfreeze"))
    @given(number=strategies.integers(0, 2**64))
    def test_draws(circuit_model, number):
        with Path(f"{circuit_model}.txt").open("a") as file:
            print(number, file=file)
"""
ON = ("--circuitfreeze", "--circuitfreeze-arch", "gpt2,llama", "circuitfreeze/test_gamma.py")
WAYS = pytest.mark.parametrize("ci", [False, True], ids=["at home", "in CI"])


def drawn(stand_in: Run, profile: str, *more: str) -> tuple[str, dict[str, list[str]]]:
    """The seed that a run printed, and what it drew for each model."""
    result = stand_in(*ON, f"--circuitfreeze-profile={profile}", *more, test_gamma=DRAWS)
    result.assert_outcomes(passed=2)
    printed = re.search(rf"profile {profile}, seed (\d+);", result.stdout.str())
    assert printed
    found = {}
    for path in (Path("gpt2.txt"), Path("llama.txt")):
        found[path.stem] = path.read_text().splitlines()
        path.unlink()
    return printed[1], found


@pytest.fixture
def where(ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CI, Hypothesis loads a profile of its own that takes no seed and draws the same each time."""
    for name in ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "TOX_ENV_NAME"):
        monkeypatch.delenv(name, raising=False)
    if ci:
        monkeypatch.setenv("CI", "1")


@pytest.mark.parametrize(("profile", "examples"), [("quick", 5), ("standard", 25), ("thorough", 300)])
def test_each_profile_has_its_number_of_examples(stand_in: Run, profile: str, examples: int) -> None:
    _, numbers = drawn(stand_in, profile)
    assert {len(each) for each in numbers.values()} == {examples}


@WAYS
@pytest.mark.usefixtures("where")
def test_thorough_draws_new_examples_each_time(stand_in: Run) -> None:
    (seed, numbers), (other_seed, others) = (drawn(stand_in, "thorough") for _ in range(2))
    assert seed != other_seed
    # Some numbers Hypothesis tries under any seed.
    assert len(set(numbers["gpt2"]) & set(others["gpt2"])) < 100


@WAYS
@pytest.mark.usefixtures("where")
@pytest.mark.parametrize(("first", "again"), [((), ("-n", "2")), (("-n", "2"), ())], ids=["then two", "two first"])
def test_the_printed_seed_gives_the_same_examples(
    stand_in: Run, first: tuple[str, ...], again: tuple[str, ...]
) -> None:
    seed, numbers = drawn(stand_in, "thorough", *first)
    assert drawn(stand_in, "thorough", "--circuitfreeze-seed", seed, *again) == (seed, numbers)
