"""The Hypothesis profile that the shipped properties run under."""

from __future__ import annotations

NAME = "circuitfreeze"
MAX_EXAMPLES = {"quick": 5, "standard": 25, "thorough": 300}


def register(profile: str) -> None:
    """Registers :data:`NAME`, without loading it: a project's own properties keep their own profile.

    Each field that matters is stated, since an unstated one would follow the profile that is loaded, and in CI
    Hypothesis loads one that ignores seeds.
    """
    from hypothesis import HealthCheck, Phase, settings

    look = (Phase.explicit, Phase.generate)

    settings.register_profile(
        NAME,
        max_examples=MAX_EXAMPLES[profile],
        deadline=None,
        # The seed reproduces a failure; a file of examples in the user's folder is not needed for that.
        database=None,
        derandomize=False,
        print_blob=False,
        # One failure, the smallest, says what is wrong; several at once hide it in a group.
        report_multiple_bugs=False,
        # A quick look does not spend minutes on making a large model's failure smaller.
        phases=look if profile == "quick" else (*look, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
