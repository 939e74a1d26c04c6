"""A pytest plugin that keeps what tests measured, for the scripts that write it into pages of docs/.

Rows live in pytest's cache, by page. A row is kept only when its test has passed.
"""

from __future__ import annotations

from typing import Any

import pytest

CACHE_FOLDER = "ds_seg"
PAGES = ("fidelity", "faults")


def keep_row(request: pytest.FixtureRequest, page: str, row: dict[str, Any]) -> None:
    """Add a row to a page, if the test passes."""
    assert page in PAGES, page
    request.node.user_properties.append((page, row))


class MeasuredRows:
    """Collects the rows of passed tests, also from other processes, and keeps them at the end."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {page: [] for page in PAGES}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the rows of a test that passed."""
        if report.when == "call" and report.passed:
            for page, row in report.user_properties:
                if page in PAGES:
                    self.rows[page].append({**row, "test": report.nodeid})  # type: ignore[dict-item]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Keep them where a script finds them."""
        cache = getattr(session.config, "cache", None)  # none under -p no:cacheprovider
        if cache is None or hasattr(session.config, "workerinput"):
            return
        for page, rows in self.rows.items():
            if rows:
                cache.set(f"{CACHE_FOLDER}/{page}", rows)


def pytest_configure(config: pytest.Config) -> None:
    """Collect in the process that reports."""
    config.pluginmanager.register(MeasuredRows())
