"""Turns the results of a run into documents: ``report.json`` first, everything else from that JSON alone."""

from __future__ import annotations

from pytest_circuitfreeze.reports.document import SCHEMA, ReportError, build, read
from pytest_circuitfreeze.reports.files import write

__all__ = ["SCHEMA", "ReportError", "build", "read", "write"]
