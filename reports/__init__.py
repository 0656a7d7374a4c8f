"""Turns the results of a run into documents: ``report.json`` first, everything else from that JSON alone."""

from __future__ import annotations

from pytest_circuitfreeze.reports import markdown, plots
from pytest_circuitfreeze.reports.document import SCHEMA, Ended, Report, ReportError, build, parse, read
from pytest_circuitfreeze.reports.files import DOCUMENT, render, write

__all__ = [
    "DOCUMENT",
    "SCHEMA",
    "Ended",
    "Report",
    "ReportError",
    "build",
    "markdown",
    "parse",
    "plots",
    "read",
    "render",
    "write",
]
