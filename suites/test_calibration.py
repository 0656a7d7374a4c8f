"""Calibrated statistics are right."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import PreTrainedModel

from pytest_circuitfreeze.engines import Engine, FreezeCore
from pytest_circuitfreeze.results import CircuitRecord
from pytest_circuitfreeze.strategies import calibrations
from pytest_circuitfreeze.suites.calibration import check_statistics_are_of_the_real_tokens
from pytest_circuitfreeze.suites.claims import NotApplicable
from pytest_circuitfreeze.suites.judge.site_lookup import sites
from pytest_circuitfreeze.suites.properties import proven


@proven
def test_statistics_are_of_the_real_tokens(
    circuit_engine: Engine, circuit_model: PreTrainedModel, circuit_record: CircuitRecord, data: st.DataObject
) -> None:
    """Calibrated means and deviations are those of all real tokens, and of nothing else."""
    if circuit_engine.name != FreezeCore.name:
        raise NotApplicable("statistics are freeze_core's, whichever engine freezes to them")
    layer = data.draw(st.sampled_from(sorted(sites(circuit_model))), label="layer")
    statistics = data.draw(calibrations(circuit_model, [layer], least=2), label="statistics")
    circuit_record.observe(check_statistics_are_of_the_real_tokens(circuit_model, statistics))
