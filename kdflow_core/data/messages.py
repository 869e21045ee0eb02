"""One message of a conversation, as chat templates know it, from the forms in which people have it.

The whole message goes to the template; what has several spellings gets the one that the Hugging
Face templates read: `role`, `content` as text, `tool_calls` with arguments as values,
`reasoning_content`.
"""

import json
from collections.abc import Mapping
from typing import Any

from kdflow_core.errors import KdflowError

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
RENAMED = {
    "from": "role",
    "value": "content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
}
FLAGS = ("weight", "loss", "train")
TEXT_PARTS = ("text", "input_text", "output_text")


class SampleError(KdflowError):
    """A sample that is dropped and counted under `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def normal_message(raw: Any) -> Message:
    """A message with `role` and a text `content`. Raises SampleError `bad_message` or `media`.

    `kdflow_unsupervised` marks an answer that is not to be learned from (`weight: 0`, `loss: false`
    or `train: false`).
    """
    if not isinstance(raw, Mapping):
        raise SampleError("bad_message", f"not a message: {raw!r:.200}")
    message = {RENAMED.get(name, name): value for name, value in without_none(raw).items()}
    given = message.get("role")
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise SampleError(
            "bad_message", f"not a message with a known role (or `from`): {raw!r:.200}"
        )
    message["role"] = role
    _set_content(message)
    if str(given).strip().lower() == "function_call":
        message["tool_calls"], message["content"] = message["content"], ""
    if "function_call" in message:  # OpenAI's older form
        message["tool_calls"] = [message.pop("function_call")]
    calls = message.pop("tool_calls", None)
    if not is_blank(calls):
        message["tool_calls"] = [_tool_call(call) for call in listed(calls, "tool_calls")]
    if "reasoning_content" in message:
        # Templates read it under one of these names.
        message |= dict.fromkeys(("reasoning", "thinking"), message["reasoning_content"])
    flags = [message.pop(name) for name in FLAGS if name in message]
    if role == "assistant" and any(not _learned(flag) for flag in flags):
        message["kdflow_unsupervised"] = True
    return message


def _learned(flag: Any) -> bool:
    if isinstance(flag, str):
        flag = {"true": True, "false": False}.get(flag.lower(), flag)
    if flag not in (0, 1):  # False and True too
        raise SampleError(
            "bad_message",
            f"a message has the weight {flag!r}; kdflow learns from a message or does not: 1 or 0",
        )
    return bool(flag)


def _set_content(message: Message) -> None:
    """Content as text; parts of it that are thoughts go to `reasoning_content`."""
    content = message.get("content", "")
    if isinstance(content, list) and all(isinstance(p, str | Mapping) for p in content):
        texts, thoughts = [], []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if isinstance(part, str):
                texts.append(part)
            elif kind in TEXT_PARTS and "text" in part:
                texts.append(as_text(part["text"]))
            elif kind in ("thinking", "reasoning"):
                thoughts.append(as_text(part.get("thinking", part.get("text"))))
            elif message["role"] == "tool" and "type" not in part:
                texts.append(json.dumps(part, ensure_ascii=False))
            else:
                raise SampleError(
                    "media", f"a message has a part of type '{kind}', and kdflow trains on text"
                )
        content = "".join(texts)
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
    elif message["role"] == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)  # a result that is data
    message["content"] = as_text(content)


def _tool_call(call: Any) -> Message:
    """`{"type": "function", "function": {"name": ..., "arguments": {...}}}`."""
    call = _from_json(call, "tool_calls")
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise SampleError("bad_message", f"a tool call without a function's name: {call!r:.200}")
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise SampleError(
                "bad_message", f"the arguments of a call of {inner['name']} are not JSON: {error}"
            ) from error
    outer = {k: v for k, v in call.items() if k == "id"}
    return {
        **outer,
        "type": "function",
        "function": {"name": inner["name"], "arguments": arguments},
    }


def normal_tools(value: Any) -> list[Message]:
    """Tools as JSON schemas under `function`. Raises SampleError `bad_message`."""
    tools = []
    for item in listed(value, "tools"):
        tool = without_none(_from_json(item, "tools"))
        if not isinstance(tool, Mapping):
            raise SampleError("bad_message", f"a tool is not a JSON schema: {tool!r:.200}")
        wrapped = isinstance(tool.get("function"), Mapping)
        tools.append(dict(tool) if wrapped else {"type": "function", "function": dict(tool)})
    return tools


def listed(value: Any, what: str) -> list[Any]:
    """A list, given as one, as JSON text, or as a table of columns (what Arrow makes of a list of
    structs in some files). Raises SampleError `bad_message`.
    """
    value = _from_json(value, what)
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, Mapping) and what == "tool_calls":
        return [value]  # one call
    if not isinstance(value, list | tuple):
        raise SampleError("bad_message", f"`{what}` is no list but {type(value).__name__}")
    return list(value)


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SampleError("bad_message", f"`{what}` is text, and not JSON: {error}") from error


def as_text(value: Any) -> str:
    """Text, or a SampleError `bad_message`."""
    if not isinstance(value, str):
        raise SampleError(
            "bad_message", f"expected text, got {type(value).__name__}: {value!r:.200}"
        )
    return value


def is_blank(value: Any) -> bool:
    """Whether an optional value is as good as none: none, blank text, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def without_none(value: Any) -> Any:
    """A copy without the keys that are None, at any depth: files with a schema have them all."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_none(v) for v in value]
    return value
