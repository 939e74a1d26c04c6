"""A pytest plugin that keeps what the parity tests measured, for scripts/write_fidelity.py to write down.

Rows live in pytest's cache. A row is kept only when its test has passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CACHE_KEY = "ds_seg/fidelity"
_PROPERTY = "fidelity"


class FidelityRows:
    """Collects the rows of passed tests, also from other processes, and keeps them at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the rows of a test that passed."""
        if report.when == "call" and report.passed:
            self.rows += [{**row, "test": report.nodeid} for key, row in report.user_properties if key == _PROPERTY]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Keep them where a script finds them."""
        if self.rows and not hasattr(session.config, "workerinput"):
            assert session.config.cache is not None
            session.config.cache.set(CACHE_KEY, self.rows)


def pytest_configure(config: pytest.Config) -> None:
    """Collect in the process that reports."""
    config.pluginmanager.register(FidelityRows())


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Assert that a measured difference is below its tolerance, and keep it as a row of docs/fidelity.md."""

    def record(text: str, *, measured: float, tolerance: float, against: str, world: int | None = None) -> None:
        row = {"kind": "claim", "text": text, "against": against, "world": world}
        _keep(request, row, measured, tolerance)
        assert measured < tolerance, f"{text}: {measured:.3g}, want below {tolerance:.3g}"

    return record


@pytest.fixture
def caught(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Assert that a deliberate mistake moves a test's measure beyond its tolerance, and keep it as a row."""

    def record(mutation: str, *, by: str, measured: float, tolerance: float) -> None:
        row = {"kind": "mutation", "text": mutation, "by": by}
        _keep(request, row, measured, tolerance)
        assert not measured < tolerance, f"{mutation}: {measured:.3g} passes {by}, which allows {tolerance:.3g}"

    return record


@pytest.fixture
def curves(request: pytest.FixtureRequest) -> Callable[[dict[str, list[float]]], None]:
    """Keep loss curves for the picture of docs/fidelity.md."""
    return lambda by_name: request.node.user_properties.append((_PROPERTY, {"kind": "curves", "curves": by_name}))


def _keep(request: pytest.FixtureRequest, row: dict[str, Any], measured: float, tolerance: float) -> None:
    row = {**row, "measured": float(measured), "tolerance": float(tolerance)}
    request.node.user_properties.append((_PROPERTY, row))
