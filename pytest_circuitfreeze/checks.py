"""Checks for an intervention of one's own: every shipped claim as a function, in a test or a notebook::

    from pytest_circuitfreeze import checks

    checks.check_independence(model, freeze)           # all claims about independence, on drawn examples
    checks.check_qk_leaves_ov(model, freeze)           # one claim
    checks.check_removal(model, freeze, config, batch) # on this config and these inputs

`freeze` is a function `freeze(model, config)` that gives a context manager, an engine, or :func:`fixed`, for what takes
no config. There is one `check_<name>` for each of :func:`subjects` and each of :func:`claims`, all of them
:func:`check` with its first argument filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_circuitfreeze import collect, profiles
from pytest_circuitfreeze.interventions import FixedIntervention, as_engine, fixed
from pytest_circuitfreeze.preconditions import unusable
from pytest_circuitfreeze.results import CircuitRecord

if TYPE_CHECKING:
    from hypothesis import strategies as st
    from transformers import PreTrainedModel

    from freeze_core import InterventionConfig
    from pytest_circuitfreeze.engines import Engine
    from pytest_circuitfreeze.interventions import Freeze
    from pytest_circuitfreeze.strategies import Batch

__all__ = ["Finding", "NothingChecked", "check", "claims", "fixed", "subjects"]

EVERYTHING = "everything"
EXAMPLES = 25
"""How many examples a claim is tried on, where nothing else is asked for."""


class NothingChecked(AssertionError):
    """No claim that was asked about could be tried; the message says why of each."""


class Finding(NamedTuple):
    """What came of one claim that was not broken; `CircuitRecord.observe` takes it, too.

    Args:
        claim: its name.
        sentence: what it says.
        outcome: `passed`; `refused` (by an `UnsupportedModelError`, whatever was drawn); `not offered` (by the engine's
            `supports` or `not_offered`); or `n/a` (the claim says nothing about this model, config or batch, or asks
            for what such an intervention is not made for).
        examples: how many it was tried on.
        error, bound: the largest error beside what was allowed there, the two that were closest; 0.0 is bit for bit.
        reasons: why it was not tried, or not on every example.
    """

    claim: str
    sentence: str
    outcome: str
    examples: int
    error: float
    bound: float
    reasons: tuple[str, ...]


class _Claim(NamedTuple):
    subject: str
    sentence: str
    example: Callable[..., None]
    """Runs one example: of engine, model, record and Hypothesis's data."""


def check(
    about: str,
    model: PreTrainedModel,
    freeze: Engine | Freeze,
    config: InterventionConfig | st.SearchStrategy[InterventionConfig] | None = None,
    batch: Batch | st.SearchStrategy[Batch] | None = None,
    *,
    examples: int = EXAMPLES,
    seed: int = 0,
) -> tuple[Finding, ...]:
    """Tries the claims `about` something on an intervention.

    Args:
        about: one of `subjects()` or of `claims()`, or `everything`.
        model: in eval mode; it is what it was afterwards, if the intervention leaves it so.
        freeze: `freeze(model, config)`, which gives a context manager that yields the frozen callable; an object with
            such a method, and `name`; or what `fixed` gives, whose config is then the one that is tried.
        config: the one to try, or a strategy that gives those that `freeze` is made for; by default all are drawn.
        batch: the inputs to try, or a strategy; by default they are drawn.
        examples: how many to draw at most for each claim.
        seed: decides what is drawn.

    Returns:
        one finding a claim, none of which is broken and at least one of which passed.

    Raises:
        ClaimBroken: the first claim that is broken, with the smallest example that was found.
        NothingChecked: none could be tried.
        ValueError, TypeError: an argument is not what it should be.
    """
    engine = as_engine(freeze)
    if config is None and isinstance(engine, FixedIntervention):
        config = engine.config
    _check_arguments(model, config, batch, examples)
    reason = unusable(model)
    if reason is not None:
        raise ValueError(f"model: {type(model).__name__} cannot be checked: {reason}")
    stated = {name: value for name, value in (("config", config), ("batch", batch)) if value is not None}
    findings = tuple(
        _tried(name, claim, engine, model, stated, examples, seed) for name, claim in _chosen(about).items()
    )
    if all(finding.outcome != "passed" for finding in findings):
        reasons = [f"{one.claim} ({one.outcome}): {'; '.join(one.reasons)}" for one in findings]
        raise NothingChecked("\n  ".join([f"nothing about {about} could be checked:", *reasons]))
    return findings


def claims() -> dict[str, str]:
    """The name of each shipped claim, and what it says."""
    return {name: claim.sentence for name, claim in _claims().items()}


def subjects() -> tuple[str, ...]:
    """What the shipped claims are about: `independence`, `locality`, `removal`, ..."""
    return tuple(dict.fromkeys(claim.subject for claim in _claims().values()))


def __getattr__(name: str) -> Callable[..., tuple[Finding, ...]]:
    # Whether there is such a claim is found out when it is called: the suites must not be imported by a conftest.py,
    # before the options are read that they depend on.
    if not name.startswith("check_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(check, name.removeprefix("check_"))


def __dir__() -> list[str]:
    return sorted([*__all__, *(f"check_{name}" for name in (*subjects(), *claims(), EVERYTHING))])


@cache
def _claims() -> Mapping[str, _Claim]:
    """The shipped claims by name, in the order of the suites."""
    _register_profile()
    found: dict[str, _Claim] = {}
    for path in collect.suite_files(bench=False):
        module = import_module(f"{collect.SUITES}.{path.stem}")
        for name, test in vars(module).items():
            if name.startswith("test_"):
                sentence = (test.__doc__ or name).strip().splitlines()[0]
                subject = path.stem.removeprefix("test_")
                found[name.removeprefix("test_")] = _Claim(subject, sentence, test.hypothesis.inner_test)
    return found


def _register_profile() -> None:
    """The suites ask for the profile of a run when they are imported; outside of one there is none yet."""
    from hypothesis import settings
    from hypothesis.errors import InvalidArgument

    try:
        settings.get_profile(profiles.NAME)
    except InvalidArgument:
        profiles.register("standard")


def _chosen(about: str) -> dict[str, _Claim]:
    chosen = {name: claim for name, claim in _claims().items() if about in (name, claim.subject, EVERYTHING)}
    if not chosen:
        raise ValueError(f"about={about!r}: no shipped claim and no subject is called so{_instead(about)}")
    return chosen


def _instead(about: str) -> str:
    near = get_close_matches(about, [*subjects(), *claims()], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(subjects())}"


def _check_arguments(model: Any, config: Any, batch: Any, examples: int) -> None:
    from hypothesis import strategies as st

    from freeze_core.config import check_config
    from pytest_circuitfreeze.strategies import Batch

    if model.training:
        raise ValueError(f"model: {type(model).__name__} is in training mode; call model.eval() first")
    if config is not None and not isinstance(config, st.SearchStrategy):
        check_config(config)
        if config.freeze_type == "reference" and batch is None:
            raise ValueError("batch=None: a config with a reference is for inputs of its shape; give such a batch too")
    if batch is not None and not isinstance(batch, Batch | st.SearchStrategy):
        raise TypeError(f"batch={batch!r}: must be a Batch of pytest_circuitfreeze.strategies, or a strategy of those")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"examples={examples!r}: must be an int of 1 or more")


def _tried(
    name: str,
    claim: _Claim,
    engine: Engine,
    model: PreTrainedModel,
    stated: Mapping[str, Any],
    examples: int,
    seed: int,
) -> Finding:
    """Tries one claim on up to `examples` examples."""
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.errors import Unsatisfiable

    from pytest_circuitfreeze.stated import StatedData

    record = CircuitRecord()
    used: set[str] = set()

    def example(data: st.DataObject) -> None:
        given = StatedData(data, stated)
        try:
            claim.example(engine, model, record, given)
        finally:
            used.update(given.used)

    property_ = hypothesis.seed(seed)(_settings(examples)(hypothesis.given(data=st.data())(example)))
    try:
        property_()
    except Unsatisfiable:
        pass  # every example was refused, or is not what the claim is about: no example is recorded
    except AssertionError as error:
        error.__notes__ = []  # Hypothesis's words for its arguments; the message has them
        raise
    return _finding(name, claim.sentence, record, "config" not in stated or "config" in used)


def _settings(examples: int) -> Any:
    from hypothesis import HealthCheck, Phase, settings

    return settings(
        settings.get_profile(profiles.NAME),
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink),
        # What is stated leaves few examples that count, and a check may stand inside a property of the user's.
        suppress_health_check=list(HealthCheck),
    )


def _finding(name: str, sentence: str, record: CircuitRecord, about_config: bool) -> Finding:
    """What a record says of a claim that was not broken."""
    told = (record.refused, record.silent, *record.refusals, *record.not_offered)
    reasons = tuple(reason for reason in told if reason)
    outcome = "passed"
    if not about_config:
        outcome, reasons = "n/a", ("it is not about a config, or chooses its own",)
    elif record.refused or (record.examples == 0 and record.refusals):
        outcome = "refused"
    elif record.offers_nothing:
        outcome = "not offered"
    elif record.examples == 0:
        outcome, reasons = "n/a", reasons or ("it is not about such a config or batch",)
    return Finding(name, sentence, outcome, record.examples, record.error, record.bound, reasons)
