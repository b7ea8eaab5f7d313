"""Reports of pytest on their way from one process to another: a line of JSON each, in pytest's own serialised form."""

import json
from typing import Any

import pytest


def line_of(config: pytest.Config, report: pytest.TestReport, **more: object) -> str:
    """Return a report, and what else is to be known about it, as a line."""
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    return json.dumps(data | more) + "\n"


def report_of(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """Return the report that a line's data stand for."""
    if data["outcome"] == "skipped" and isinstance(data["longrepr"], list):
        data = data | {"longrepr": tuple(data["longrepr"])}  # JSON knows no tuples, and pytest insists on one
    report = config.hook.pytest_report_from_serializable(config=config, data=data)
    assert isinstance(report, pytest.TestReport)
    return report
