"""Rows as people have them: everything in a message is honoured, or refused by name."""

import json
from typing import Any

import pytest

from kdflow_core.data.conversations import Conversation, parse_row
from kdflow_core.data.messages import SampleError

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "yo"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def parse(row: dict[str, Any], **options: Any) -> Conversation:
    return parse_row(row, layout="auto", columns={}, **options)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "f", "arguments": '{"x": 1}'}},
        {"name": "f", "arguments": {"x": 1}},
        {"name": "f", "arguments": '{"x": 1}', "type": None},
        json.dumps({"name": "f", "arguments": {"x": 1}}),
        {"name": "f", "parameters": {"x": 1, "y": None}},
    ],
)
def test_spellings_of_a_tool_call(call: Any) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (_, parsed) = parse({"messages": [USER, message]}).messages
    assert parsed == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    ],
)
def test_older_forms_of_a_tool_call(message: dict[str, Any]) -> None:
    (_, parsed) = parse({"messages": [USER, message]}).messages
    assert parsed["tool_calls"] == [CALL]


def test_a_call_keeps_the_id_that_its_result_names() -> None:
    call = CALL | {"id": "abc123def"}
    result = {"role": "tool", "tool_call_id": "abc123def", "content": "42"}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, result, BOT]
    parsed = parse({"messages": messages}).messages
    assert parsed[1]["tool_calls"][0]["id"] == parsed[2]["tool_call_id"] == "abc123def"


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("developer", "system"),
        ("Human", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("observation", "tool"),
        ("function", "tool"),
        ("tool", "tool"),
        ("ipython", "tool"),
    ],
)
def test_roles(role: str, expected: str) -> None:
    first = {"role": role, "content": "text"}
    assert parse({"messages": [USER, first, USER, BOT]}).messages[1]["role"] == expected


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]]
)
def test_tools_reach_the_template(tools: Any) -> None:
    assert parse({"messages": [USER, BOT], "tools": tools}).tools == (TOOL,)


def test_tools_of_a_system_message_count() -> None:
    system = {"role": "system", "content": "be", "tools": [TOOL]}
    conversation = parse({"messages": [system, USER, BOT]})
    assert conversation.tools == (TOOL,)
    assert "tools" not in conversation.messages[0]


def test_what_a_file_with_a_schema_adds_is_taken_away() -> None:
    """Arrow gives every struct all fields that any of them has."""
    row = {
        "messages": [
            USER | {"tool_calls": None, "name": None},
            {
                "role": "assistant",
                "content": None,
                "name": None,
                "tool_calls": [{"type": "function", "function": CALL["function"] | {"y": None}}],
            },
        ],
        "tools": [TOOL | {"strict": None}],
        "system": None,
    }
    conversation = parse(row)
    assert conversation.messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    )
    assert conversation.tools == (TOOL,)


@pytest.mark.parametrize(
    "messages",
    [
        json.dumps([USER, BOT]),
        {"role": ["user", "assistant"], "content": ["hi", "yo"]},
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}),
    ],
    ids=["JSON text", "a table of columns", "a tuple"],
)
def test_forms_of_a_list_of_messages(messages: Any) -> None:
    assert parse({"messages": messages}).messages == (USER, BOT)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], "hi"),
        ([{"text": "hi"}], "hi"),
        (["h", "i"], "hi"),
        ([{"type": "input_text", "text": "hi", "image": None}], "hi"),
    ],
)
def test_parts_that_are_text_are_text(content: Any, expected: str) -> None:
    assert (
        parse({"messages": [USER | {"content": content}, BOT]}).messages[0]["content"] == expected
    )


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                USER | {"content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
                BOT,
            ]
        },
        {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, BOT]},
        {"messages": [USER | {"content": [{"type": "input_audio", "data": "x"}]}, BOT]},
        {"messages": [USER, BOT], "images": ["a.png"]},
        {"prompt": "hi", "completion": "yo", "image": {"bytes": b"x"}},
    ],
)
def test_media_are_refused_by_name(row: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match="kdflow trains on text") as caught:
        parse(row)
    assert caught.value.reason == "media"


def test_empty_media_columns_are_none() -> None:
    assert parse({"messages": [USER, BOT], "images": [], "audio": None}).messages == (USER, BOT)


@pytest.mark.parametrize(
    "message",
    [
        BOT | {"reasoning_content": "why"},
        BOT | {"reasoning": "why"},
        BOT | {"thinking": "why"},
        BOT
        | {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "yo"}]},
    ],
)
def test_thoughts_are_kept(message: dict[str, Any]) -> None:
    (_, parsed) = parse({"messages": [USER, message]}).messages
    assert (parsed["content"], parsed["reasoning_content"]) == ("yo", "why")


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": "false"}]
)
def test_flags_of_answers_that_are_not_learned(flag: dict[str, Any]) -> None:
    conversation = parse({"messages": [USER, BOT | flag, USER, BOT | {"weight": 1}]})
    assert conversation.unsupervised == {1}
    assert conversation.messages == (USER, BOT, USER, BOT)


def test_a_weight_that_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(SampleError, match=r"the weight 0\.5; kdflow learns from a message or does"):
        parse({"messages": [USER, BOT | {"weight": 0.5}]})


def test_alpacas_history_comes_first() -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    texts = [m["content"] for m in parse(row).messages]
    assert texts == ["s", "a", "b", "c", "d"]


def test_a_mapped_column_is_not_overwritten_by_one_of_its_name() -> None:
    row = {"question": "right", "prompt": "wrong", "response": "yes", "answer": "gold"}
    columns = {"prompt": "question", "completion": "response"}
    for ordered in (row, dict(reversed(row.items()))):
        parsed = parse_row(ordered, layout="auto", columns=columns)
        assert parsed.messages[0]["content"] == "right"
        assert parsed.label == "gold"


def test_a_column_that_is_mapped_has_no_other_meaning() -> None:
    """GSM8K's `answer` is the completion, and then it is no gold answer."""
    row = {"question": "2+2?", "answer": "It is 4."}
    columns = {"prompt": "question", "completion": "answer"}
    assert parse_row(row, layout="auto", columns=columns).label is None


@pytest.mark.parametrize("blank", ["", "  ", None, []])
def test_empty_optional_columns_are_absent(blank: Any) -> None:
    row = {"prompt": "hi", "completion": "yo", "system": blank, "answer": blank, "tools": blank}
    conversation = parse(row)
    assert conversation.messages == (USER, BOT)
    assert conversation.label is None
    assert conversation.tools == ()


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"prompt": "hi"}, 1),
        ({"prompt": [USER]}, 1),
        ({"messages": [USER]}, 1),
        ({"messages": [USER, BOT, USER]}, 3),
    ],
)
def test_prompts_alone_where_answers_are_written(row: dict[str, Any], count: int) -> None:
    conversation = parse(row, prompts=True)
    assert conversation.lacks_answer
    assert len(conversation.messages) == count


@pytest.mark.parametrize("row", [{"prompt": "hi"}, {"messages": [USER]}])
def test_prompts_alone_elsewhere_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match=r"set data\.answers") as caught:
        parse(row)
    assert caught.value.reason == "no_answer"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "\ud800", "completion": "x"}, "malformed"),
        ({"prompt": "x", "completion": "x", "answer": "\udfff"}, "malformed"),
        ({"messages": [USER, BOT | {"tool_calls": [{"arguments": {}}]}]}, "bad_message"),
        (
            {"messages": [USER, BOT | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "bad_message",
        ),
        ({"messages": [USER, BOT], "tools": "no JSON"}, "bad_message"),
        ({"messages": ["hi", "yo"]}, "bad_message"),
        ({"messages": [{"role": 3, "content": "x"}]}, "bad_message"),
        ({"instruction": "a", "output": "b", "history": [["one"]]}, "bad_message"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, "bad_message"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": []}]}, "empty"),
    ],
)
def test_unusable_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse(row)
    assert caught.value.reason == reason


def test_nesting_beyond_the_stack_costs_its_row_alone() -> None:
    value: Any = {}
    for _ in range(5000):
        value = {"x": value}
    with pytest.raises(SampleError, match="nested too deeply"):
        parse({"messages": [USER, BOT | {"metadata": value}]})


def test_a_result_that_is_data_is_text_for_the_template() -> None:
    messages = [USER, BOT | {"tool_calls": [CALL]}, {"role": "tool", "content": {"t": 21}}, BOT]
    assert parse({"messages": messages}).messages[2]["content"] == '{"t": 21}'


def test_ids_of_messages_make_no_other_conversation() -> None:
    one, other = ({"messages": [USER | {"id": n}, BOT]} for n in (1, 2))
    assert parse(one).text == parse(other).text
