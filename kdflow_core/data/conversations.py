"""Rows of the usual data layouts as one kind of conversation.

Layouts: `messages` (role/content), `sharegpt` (conversations of from/value), `alpaca`
(instruction/input/output/history), `prompt_completion` and `prompt` (without an answer). A column
`tools` goes to the chat template, `answer` is kept as the gold answer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kdflow_core.data.messages import (
    Message,
    SampleError,
    as_text,
    is_blank,
    listed,
    normal_message,
    normal_tools,
    without_none,
)

COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "prompt": ("prompt",),
}
OPTIONAL_COLUMNS = ("system", "input", "history", "tools", "answer")
CANONICAL = {name for need in COLUMNS.values() for name in need} | set(OPTIONAL_COLUMNS)
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
# What a conversation is known by. Whatever else a message has (ids, scores) reaches the template.
HASHED_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "name")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages as templates know them, the last one from the assistant unless the answer is still
    to be written; the tools that they may call; the messages that are not to be learned from; and
    how texts were rewritten.
    """

    messages: tuple[Message, ...]
    label: str | None
    tools: tuple[Message, ...] = ()
    unsupervised: frozenset[int] = frozenset()
    rewrites: tuple[Callable[[str], str], ...] = ()

    @property
    def lacks_answer(self) -> bool:
        """Whether there is only a prompt."""
        return str(self.messages[-1]["role"]) != "assistant"

    def rewritten(self, rewrite: Callable[[str], str]) -> "Conversation":
        """The same with every text rewritten: of messages, thoughts, calls and tools; and what a
        template makes of them is to be, too.
        """
        messages = tuple(_rewritten(m, rewrite) for m in self.messages)
        rewrites = (*self.rewrites, rewrite)
        return replace(
            self, messages=messages, tools=_rewritten(self.tools, rewrite), rewrites=rewrites
        )

    def as_read(self, rendered: str) -> str:
        """What a template has made of it, rewritten."""
        for rewrite in self.rewrites:
            rendered = rewrite(rendered)
        return rendered

    @cached_property
    def text(self) -> str:
        """Canonical text: what the selection hashes."""
        return self._canonical(len(self.messages))

    @cached_property
    def prompt_text(self) -> str:
        """Canonical text up to the first answer: what the split hashes."""
        roles = [m["role"] for m in self.messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        return self._canonical(first)

    def _canonical(self, count: int) -> str:
        known = [{k: m[k] for k in HASHED_FIELDS if k in m} for m in self.messages[:count]]
        text = json.dumps(known, sort_keys=True, ensure_ascii=False)
        if self.tools:
            text += json.dumps(self.tools, sort_keys=True, ensure_ascii=False)
        return text


def _rewritten(value: Any, rewrite: Callable[[str], str]) -> Any:
    """A value of JSON with its texts rewritten, names of fields too, which templates write out."""
    if isinstance(value, str):
        return rewrite(value)
    if isinstance(value, Mapping):
        return {rewrite(name): _rewritten(own, rewrite) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rewritten(own, rewrite) for own in value)
    return value


def detect_layout(names: set[str]) -> str | None:
    """The first layout whose columns are all there."""
    return next((layout for layout, need in COLUMNS.items() if names.issuperset(need)), None)


def parse_row(
    row: Mapping[str, Any], *, layout: str, columns: Mapping[Any, str], prompts: bool = False
) -> Conversation:
    """A raw row as a conversation; with `prompts`, one that lacks an answer will do.

    Raises:
        SampleError: `malformed`, `missing_column`, `bad_message`, `media`, `no_answer` or `empty`.
    """
    try:
        conversation = _parse(row, layout, columns, prompts=prompts)
        for text in (conversation.text, conversation.label or ""):
            text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("malformed", f"half a surrogate pair in the text: {error}") from error
    except RecursionError as error:
        raise SampleError("malformed", "a row is nested too deeply") from error
    return conversation


def _parse(
    row: Mapping[str, Any], layout: str, columns: Mapping[str, str], *, prompts: bool
) -> Conversation:
    fields = _fields(row, columns)
    media = [name for name in MEDIA_COLUMNS if name in row and not is_blank(row[name])]
    if media:
        raise SampleError("media", f"column '{media[0]}' holds media, and kdflow trains on text")
    messages = _messages(fields, _layout(fields, row, layout))
    tools = normal_tools(fields["tools"]) if "tools" in fields else _tools_of(messages)
    messages = [{k: v for k, v in m.items() if k != "tools"} for m in messages]
    if not (prompts and messages and messages[-1]["role"] in {"user", "tool"}):
        messages = _through_last_answer(messages)
    _refuse_empty_answers(messages)
    off = [i for i, m in enumerate(messages) if m.pop("kdflow_unsupervised", False)]
    label = fields.get("answer")
    return Conversation(
        messages=tuple(messages),
        tools=tuple(tools),
        unsupervised=frozenset(off),
        label=None if label is None else str(label),
    )


def _through_last_answer(messages: list[Message]) -> list[Message]:
    """What follows the last answer teaches nothing."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not messages:
        raise SampleError("empty", "a row without messages")
    if not answers:
        raise SampleError(
            "no_answer",
            "a row has a prompt and no answer; set data.answers to have a model write it",
        )
    return messages[: answers[-1] + 1]


def _refuse_empty_answers(messages: list[Message]) -> None:
    for message in messages:
        said = (message["content"], str(message.get("reasoning_content", "")))
        if (
            message["role"] == "assistant"
            and not any(text.strip() for text in said)
            and not message.get("tool_calls")
        ):
            raise SampleError("empty", "an assistant message is empty")


def _fields(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's values under kdflow's names. A column that is mapped to one name has no other."""
    taken = set(columns.values())
    fields = {}
    for name in CANONICAL:
        actual = columns.get(name, None if name in taken else name)
        value = row.get(actual) if actual is not None else None
        if value is None or (name in OPTIONAL_COLUMNS and is_blank(value)):
            continue
        fields[name] = value
    return fields


def _layout(fields: Mapping[str, Any], row: Mapping[str, Any], layout: str) -> str:
    found = detect_layout(set(fields)) if layout == "auto" else layout
    if found is None:
        raise SampleError(
            "missing_column",
            f"columns {sorted(map(str, row))} fit none of the layouts "
            + "; ".join(f"{name}: {', '.join(need)}" for name, need in COLUMNS.items())
            + "; map them with `columns`",
        )
    missing = [name for name in COLUMNS[found] if name not in fields]
    if missing:
        raise SampleError(
            "missing_column",
            f"layout '{found}' needs column '{missing[0]}', got {sorted(map(str, row))}",
        )
    return found


def _messages(fields: Mapping[str, Any], layout: str) -> list[Message]:
    if layout == "messages":
        messages = [normal_message(m) for m in listed(fields["messages"], "messages")]
    elif layout == "sharegpt":
        messages = [normal_message(m) for m in listed(fields["conversations"], "conversations")]
    elif layout == "alpaca":
        parts = [fields["instruction"], fields.get("input") or ""]
        prompt = "\n\n".join(as_text(part) for part in parts if part)
        messages = [*_history(fields.get("history")), *_exchange(prompt, fields["output"])]
    else:
        messages = _exchange(fields["prompt"], fields.get("completion"))
    if "system" in fields and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": as_text(fields["system"])})
    return messages


def _history(history: Any) -> list[Message]:
    """Alpaca's earlier turns: pairs of question and answer."""
    messages = []
    for pair in [] if history is None else listed(history, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SampleError("bad_message", f"`history` has pairs of texts, got {pair!r:.200}")
        messages += _exchange(*pair)
    return messages


def _exchange(prompt: Any, completion: Any) -> list[Message]:
    """A prompt and its completion, if it has one; both as text, or as messages (TRL's form)."""
    messages: list[Message] = []
    for value, role in ((prompt, "user"), (completion, "assistant")):
        if value is None:
            continue
        if isinstance(value, list):
            messages += [normal_message(m) for m in value]
        else:
            messages.append({"role": role, "content": as_text(value)})
    return messages


def _tools_of(messages: list[Message]) -> list[Message]:
    """Tools that a system message brings along."""
    found = [m["tools"] for m in messages if m["role"] == "system" and m.get("tools")]
    return normal_tools(without_none(found[0])) if found else []
