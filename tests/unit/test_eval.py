"""Answer matching, and progress lines."""

import logging
import math

import numpy as np
import pytest
from pydantic import ValidationError

from configs.schema.data import DataConfig
from kdflow_core.eval.answers import answer_matches
from kdflow_core.eval.greedy import exact_match
from kdflow_core.eval.sample_sums import COLUMNS, COUNTS, _scores
from tasks.execution.progress import ProgressLog, clock


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
        ("The answer is 2.5", "5", False),
        ("It is 10/5", "5", False),
        ("Use C++", "C", False),
        ("Use C", "C++", False),
        ("Use C#.", "C#", True),
        ("I like C++.", "C++", True),
        ("It is 1,000.", "1000", True),
        ("It is 1000", "1,000", True),
        ("12,345,678.50", "12345678.5", True),
        ("It is 1,5", "5", False),
        ("It is 2,500", "500", False),
        ("That makes 5.0", "5", True),
        ("That makes 5.", "5", True),
        ("That makes .5", "0.5", True),
        ("That makes 5%", "5", False),
        ("at 10:05", "5", False),
        ("2+3=5", "5", True),
        ("So x = -8.", "-8", True),
        ("So x = \u22128.", "-8", True),
        ("**Paris**", "Paris", True),
        ('It is "Paris"!', "Paris", True),
        ("It is $1,000.", "1000", True),
        ("\u7b54\u6848\uff1a \u5df4\u9ece\u3002", "\u5df4\u9ece", True),
        ("\u0909\u0924\u094d\u0924\u0930 42\u0964", "42", True),
        ("\u0627\u0644\u062c\u0648\u0627\u0628 42\u061f", "42", True),
        ("\uff14\uff12", "42", True),
        ("Answer:Paris", "Paris", True),
        ("Lyon,Paris", "Paris", True),
        ("version 1.2.3", "3", False),
        ("the twenty-first", "first", False),
        ("New York City", "York", False),
    ],
)
def test_answer_matches(generated: str, answer: str, matches: bool) -> None:
    assert answer_matches(generated, answer) is matches


def test_exact_match_counts_gold_answers_only() -> None:
    shares = exact_match(["4", "5", "x"], ["4", "6", None], ["a", "b", "b"])
    assert shares == {"all": 0.5, "a": 1.0, "b": 0.0}


def test_an_answer_of_many_words_is_the_end() -> None:
    assert answer_matches("The capital is New Delhi.", "new delhi")
    assert not answer_matches("The capital is Old Delhi.", "new delhi")


def test_a_loss_beyond_what_a_float_holds_is_an_infinite_perplexity() -> None:
    known = {"ce_model": 5000.0, "ce_teacher": 2.0, "compared": 1.0, "tokens": 1.0}
    sums = np.array([known.get(name, 0.0) for name in (*COLUMNS, *COUNTS)])
    scores = _scores(sums, aligned=False)
    assert scores.perplexity == math.inf
    assert scores.teacher_perplexity == pytest.approx(math.exp(2))


def test_no_source_is_called_as_all_of_them_are() -> None:
    source = {"type": "files", "path": "all", "format": "jsonl"}
    with pytest.raises(ValidationError, match="'all', which stands for all sources; set `name`"):
        DataConfig.model_validate({"sources": [source]})


def test_progress_has_rate_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("tasks.execution.progress.time.monotonic", lambda: now)
    log = ProgressLog(logging.getLogger("progress"))
    with caplog.at_level(logging.INFO):
        for done in (0, 10, 20):
            event = {"done": done, "total": 100, "unit": "steps", "detail": "loss 1"}
            log.event({"event": "progress", "rank": 0} | event)
            now += 20.0
        assert caplog.messages[-1] == "20 of 100 steps | 2.0 s per step | 2:40 left | loss 1"
        # Done at once and told one by one: no rate.
        for done in (1, 2000):
            event = {"done": done, "total": 2000, "unit": "tokens", "detail": ""}
            log.event({"event": "progress", "rank": 0} | event)
            now += 0.003
    assert caplog.messages[-1] == "2,000 of 2,000 tokens"


def test_clock() -> None:
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
