"""Fixtures with which the parity tests keep the rows of docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from measured_rows import keep_row

PAGE = "fidelity"


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
    return lambda by_name: keep_row(request, PAGE, {"kind": "curves", "curves": by_name})


def _keep(request: pytest.FixtureRequest, row: dict[str, Any], measured: float, tolerance: float) -> None:
    row = {**row, "measured": float(measured), "tolerance": float(tolerance)}
    keep_row(request, PAGE, row)
