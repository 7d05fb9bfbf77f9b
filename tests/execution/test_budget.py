"""A budget is divided fairly: shares never exceed it, and what one cell leaves goes to the later ones."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sample_records import edge, make_cell, make_ready

from orchestrator.execution.budget import Budget
from orchestrator.records.timing import measuring_s
from schemas.record import CellRecord


def test_without_a_budget_time_is_unlimited() -> None:
    budget = Budget(None, 2)
    assert budget.next_share_s() is None
    budget.spend(1e9)
    assert budget.next_share_s() is None


def test_shares_are_equal_if_each_is_used_up() -> None:
    budget = Budget(90, 3)
    for _ in range(3):
        share_s = budget.next_share_s()
        assert share_s == pytest.approx(30)
        budget.spend(share_s)


def test_unused_time_goes_to_later_cells() -> None:
    budget = Budget(90, 3)
    assert budget.next_share_s() == 30
    budget.spend(10)
    assert budget.next_share_s() == 40
    budget.spend(5)
    assert budget.next_share_s() == 75


def test_overspending_takes_from_later_cells() -> None:
    budget = Budget(90, 3)
    budget.next_share_s()
    budget.spend(80)
    assert budget.next_share_s() == 5
    budget.spend(20)
    share_s = budget.next_share_s()
    assert share_s is not None
    assert share_s < 0  # so that cell is skipped


@settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine must not fail the test
@given(st.floats(1, 1e5), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_cells_that_keep_to_their_shares_never_exceed_the_budget(total_s: float, used: list[float]) -> None:
    budget, spent_s = Budget(total_s, len(used)), 0.0
    for part in used:
        share_s = budget.next_share_s()
        assert share_s is not None
        assert share_s >= total_s / len(used) * (1 - 1e-9)
        budget.spend(share_s * part)
        spent_s += share_s * part
    assert spent_s <= total_s * (1 + 1e-9)


def cell_of(*names: str, wall_s: float | None = 100.0, ready_at_s: int | None = 50) -> CellRecord:
    edges = [edge(name, at_ns * 10**10) for at_ns, name in enumerate(names)]
    ready = None if ready_at_s is None else replace(make_ready(), at_ns=ready_at_s * 10**9)
    return make_cell(edges=edges, wall_s=wall_s, ready=ready)


def test_preparation_is_not_charged_to_the_budget() -> None:
    assert measuring_s(cell_of("start", "prepare", "context")) == pytest.approx(100 - (50 - 10))


def test_without_preparation_the_wall_time_is_charged() -> None:
    assert measuring_s(cell_of("start", "context")) == 100
    assert measuring_s(cell_of("start", "prepare", ready_at_s=None)) == 100
    assert measuring_s(cell_of(wall_s=None, ready_at_s=None)) == 0
