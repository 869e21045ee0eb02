"""The best point of the held-out curve."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.schema.run import EvalConfig
from kdflow_core.loops.best import BestPoint, Point

VALUES = st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), max_size=12)


@given(VALUES, st.integers(1, 4) | st.none(), st.data())
def test_it_goes_on_where_it_was(
    values: list[float], patience: int | None, data: st.DataObject
) -> None:
    """By any earlier points of which the best is saved, as without an end in between."""
    points = [Point(step=2 * (i + 1), value=value) for i, value in enumerate(values)]
    whole = BestPoint(patience)
    saved = {point.step for point in points if whole.add(point)}
    cut = data.draw(st.integers(0, len(points)))
    resumed = BestPoint(patience)
    others = data.draw(st.sets(st.sampled_from(points))) if points else set()
    resumed.restore(points[:cut], saved | {point.step for point in others})
    for point in points[cut:]:
        resumed.add(point)
    finite = [value for value in values if not math.isnan(value)]
    assert resumed.best == whole.best
    if whole.best is None:
        assert not finite
        return
    assert whole.best.value == min(finite)
    assert whole.best.step == 2 * (values.index(min(finite)) + 1)  # of equal ones the first
    assert resumed.is_enough == whole.is_enough


def test_patience() -> None:
    best = BestPoint(2)
    found = []
    for step, value in enumerate((3.0, 2.0, 2.0, 1.0, 1.5, math.nan), 1):
        best.add(Point(step=step, value=value))
        found.append(best.is_enough)
    assert found == [False, False, False, False, False, True]


def test_it_needs_a_curve() -> None:
    with pytest.raises(ValidationError, match=r"patience=3 waits .* say of which with keep_best"):
        EvalConfig(every_steps=3, patience=3)
