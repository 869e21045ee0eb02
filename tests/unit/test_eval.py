"""Answer matching, and progress lines."""

import logging

import pytest

from kdflow_core.eval.generation import answer_matches, exact_match
from tasks.progress import ProgressLog, clock


@pytest.mark.parametrize(
    ("generated", "answer", "matches"),
    [
        ("Paris", "Paris", True),
        ("The capital of France is Paris.", "paris", True),
        ("It is Paris, I think", "Paris", False),
        ("3 plus 5 is 18.", "8", False),
        ("The result is -8", "8", False),
        ("New York", "York", True),
        ("", "", False),
        ("anything", "", False),
    ],
)
def test_answer_matches(generated: str, answer: str, matches: bool) -> None:
    assert answer_matches(generated, answer) is matches


def test_exact_match_counts_gold_answers_only() -> None:
    shares = exact_match(["4", "5", "x"], ["4", "6", None], ["a", "b", "b"])
    assert shares == {"all": 0.5, "a": 1.0, "b": 0.0}


def test_progress_has_rate_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: now)
    log = ProgressLog(logging.getLogger("progress"))
    with caplog.at_level(logging.INFO):
        for done in (0, 10, 20):
            event = {"done": done, "total": 100, "unit": "steps", "detail": "loss 1"}
            log.event({"event": "progress", "rank": 0} | event)
            now += 20.0
    assert caplog.messages[-1] == "20 of 100 steps | 2.0 s per step | 2:40 left | loss 1"


def test_clock() -> None:
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
