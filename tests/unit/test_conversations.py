"""Data layouts as conversations."""

from typing import Any

import pytest

from kdflow_core.data.conversations import parse_row
from kdflow_core.data.messages import SampleError

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, BOT]}, (USER, BOT)),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            (USER, BOT),
        ),
        ({"instruction": "hi", "input": "", "output": "yo"}, (USER, BOT)),
        (
            {"instruction": "hi", "input": "there", "output": "yo"},
            ({"role": "user", "content": "hi\n\nthere"}, BOT),
        ),
        ({"prompt": "hi", "completion": "yo", "system": None}, (USER, BOT)),
        ({"prompt": [USER], "completion": [BOT]}, (USER, BOT)),
        (
            {"prompt": "hi", "completion": "yo", "system": "be"},
            ({"role": "system", "content": "be"}, USER, BOT),
        ),
        ({"messages": [USER, BOT, USER]}, (USER, BOT)),
    ],
)
def test_layouts(row: dict[str, Any], expected: tuple[dict[str, str], ...]) -> None:
    assert parse_row(row, layout="auto", columns={}).messages == expected


def test_columns_are_mapped_and_answers_kept() -> None:
    row = {"question": "2+2?", "response": "4", "gold": 4}
    parsed = parse_row(
        row,
        layout="prompt_completion",
        columns={"prompt": "question", "completion": "response", "answer": "gold"},
    )
    assert parsed.messages[0]["content"] == "2+2?"
    assert parsed.label == "4"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "missing_column"),
        ({"messages": "no list"}, "bad_message"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "bad_message"),
        ({"prompt": "hi", "completion": 3}, "bad_message"),
        ({"prompt": "hi", "completion": "  "}, "empty"),
        ({"messages": [USER]}, "no_answer"),
        ({"messages": []}, "empty"),
    ],
)
def test_unusable_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_row(row, layout="auto", columns={})
    assert caught.value.reason == reason
