"""Curves in pages."""

import re

import pytest

from tasks.presentation.pages import curve

MARKER = re.compile(r"<g clip-path=[^>]*>\s*<use ")


def drawn(count: int) -> str:
    points = [{"step": step, "loss": 1.0 / step} for step in range(1, count + 1)]
    return curve("loss", [("total", points, "loss")])


@pytest.mark.parametrize("count", [1, 3])
def test_few_points_are_seen_as_such_at_whole_steps(count: int) -> None:
    """Of one there is no line to be seen."""
    svg = drawn(count)
    assert MARKER.search(svg)
    ticks = re.findall(r">(\d+(?:\.\d+)?)</text>", svg.split('id="matplotlib.axis_2"')[0])
    assert ticks
    assert all("." not in tick for tick in ticks)


def test_many_are_a_line_that_stays_small() -> None:
    svg = drawn(100_000)
    assert not MARKER.search(svg)
    assert len(svg) < 500_000
