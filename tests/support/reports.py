"""Pytest reports sent between processes: one line of JSON each, in pytest's serialised form."""

import json
from typing import Any

import pytest


def line_of(config: pytest.Config, report: pytest.TestReport, **more: object) -> str:
    """Return a report as a line, with the values `more`."""
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    return json.dumps(data | more) + "\n"


def report_of(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """Return the report of a line's data."""
    if data["outcome"] == "skipped" and isinstance(data["longrepr"], list):
        data = data | {"longrepr": tuple(data["longrepr"])}  # JSON has no tuples, but pytest needs one
    report = config.hook.pytest_report_from_serializable(config=config, data=data)
    assert isinstance(report, pytest.TestReport)
    return report
