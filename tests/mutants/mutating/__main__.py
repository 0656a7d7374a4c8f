"""python -m mutating docs/mutants --sample N: tries so many mutants, or goes on to them, and writes the page.

Kept in the folder: `results.jsonl`, and `reasons.json`, written by hand, which gives for the name of a mutant that
survives the kind of its reason (see `writing.WHY`) and the reason. A mutant whose line of code was changed is another.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from mutating import running, writing
from mutating.making import mutants_of
from pytest_circuitfreeze import __version__

CHECKOUT = Path(__file__).parents[3]
SLOWEST = (
    "test_trained.py",
    "test_freezing.py::test_a_compiled_model_is_frozen_whichever_came_first",
    "test_caches.py::test_a_quantised_cache_is_handed_what_any_other_is[gpt2-zero-group]",
)


def main() -> int:
    """Runs pytest with the plugin, then writes; the exit status is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m mutating")
    parser.add_argument("folder", type=Path, help="where the results are kept")
    parser.add_argument("--sample", type=int, default=1000, metavar="N", help="how many mutants; 0: all (%(default)s)")
    parser.add_argument("--map", type=Path, required=True, metavar="FILE", help="which test runs which line; made once")
    parser.add_argument("--again", action="store_true", help="try again those of them that were not killed")
    options = parser.parse_args()
    # In a process of its own: pytest wants to be the first to import what it rewrites.
    command = [
        *(sys.executable, "-m", "pytest", "-p", "mutating.running", "-p", "no:cacheprovider"),
        *("--rootdir", str(CHECKOUT), "-c", str(CHECKOUT / "pyproject.toml")),
        *("--mutants", str(options.sample), "--mutants-map", str(options.map), *["--mutants-again"] * options.again),
        *("--mutants-results", str(options.folder / "results.jsonl")),
        *("--circuitfreeze", "--circuitfreeze-profile", "quick", "--circuitfreeze-seed", "0"),
        *("--circuitfreeze-arch", "gpt2,mistral_gqa", str(CHECKOUT / "tests" / "freeze_core")),
        *(f"--deselect=tests/freeze_core/{name}" for name in SLOWEST),
    ]
    status = subprocess.run(command).returncode
    if status:
        return status
    print(writing.write(options.folder, __version__, mutants_of(running.PACKAGE), running.BUDGET))
    return 0


if __name__ == "__main__":
    sys.exit(main())
