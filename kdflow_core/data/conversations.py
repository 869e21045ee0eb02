"""Rows of the usual data layouts as one kind of conversation.

Layouts: `messages` (role/content), `sharegpt` (conversations of from/value), `alpaca`
(instruction/input/output) and `prompt_completion`. A column `answer` is kept as the gold answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdflow_core.errors import KdflowError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL_COLUMNS = ("system", "input", "answer")


class SampleError(KdflowError):
    """A sample that is dropped and counted under `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with `role` and `content`, the last one from the assistant."""

    messages: tuple[dict[str, str], ...]
    answer: str | None

    @property
    def text(self) -> str:
        """Canonical text: what the split and the selection hash."""
        return json.dumps(self.messages, sort_keys=True, ensure_ascii=False)


def detect_layout(names: set[str]) -> str | None:
    """The first layout whose columns are all there."""
    return next((layout for layout, need in COLUMNS.items() if names.issuperset(need)), None)


def parse_row(row: Mapping[str, Any], *, layout: str, columns: Mapping[str, str]) -> Conversation:
    """A raw row as a conversation.

    Raises:
        SampleError: `missing_column`, `bad_message` or `empty`.
    """
    inverse = {actual: canonical for canonical, actual in columns.items()}
    fields = {inverse.get(name, name): value for name, value in row.items() if value is not None}
    if layout == "auto":
        found = detect_layout(set(fields))
        if found is None:
            raise SampleError(
                "missing_column",
                f"columns {sorted(row)} fit none of the layouts "
                + "; ".join(f"{name}: {', '.join(need)}" for name, need in COLUMNS.items())
                + "; map them with `columns`",
            )
        layout = found
    missing = [name for name in COLUMNS[layout] if name not in fields]
    if missing:
        raise SampleError(
            "missing_column", f"layout '{layout}' needs column '{missing[0]}', got {sorted(row)}"
        )
    messages = _messages(fields, layout)
    if not any(m["role"] == "assistant" for m in messages):
        raise SampleError("empty", "no assistant message")
    while messages[-1]["role"] != "assistant":
        messages.pop()  # what follows the last answer teaches nothing
    if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise SampleError("empty", "an assistant message is empty")
    answer = fields.get("answer")
    return Conversation(messages=tuple(messages), answer=None if answer is None else str(answer))


def _messages(fields: Mapping[str, Any], layout: str) -> list[dict[str, str]]:
    if layout == "messages":
        messages = [_message(m, "role", "content") for m in _as_list(fields["messages"])]
    elif layout == "sharegpt":
        messages = [_message(m, "from", "value") for m in _as_list(fields["conversations"])]
    elif layout == "alpaca":
        parts = [fields["instruction"], fields.get("input") or ""]
        prompt = "\n\n".join(_text(part) for part in parts if part)
        messages = _exchange(prompt, fields["output"])
    else:
        messages = _exchange(fields["prompt"], fields["completion"])
    if "system" in fields and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(fields["system"])})
    return messages


def _exchange(prompt: Any, completion: Any) -> list[dict[str, str]]:
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        return [_message(m, "role", "content") for m in [*prompt, *completion]]
    return [
        {"role": "user", "content": _text(prompt)},
        {"role": "assistant", "content": _text(completion)},
    ]


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SampleError("bad_message", f"expected a list of messages, got {type(value).__name__}")
    return value


def _message(message: Any, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or message.get(role_key) not in ROLES:
        raise SampleError("bad_message", f"not a message with a known '{role_key}': {message!r}")
    return {"role": ROLES[message[role_key]], "content": _text(message.get(content_key))}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError("bad_message", f"expected text, got {type(value).__name__}: {value!r}")
    return value
