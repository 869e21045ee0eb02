"""A conversation as token ids with a supervision mask, by a model's chat template.

A turn's prompt is what the template writes when the assistant is to speak; the answer is what a
model that was asked so would write: from there through the first token that ends a turn. What a
template marks by `{% generation %}` is not asked. Where it rewrites what stands before a turn once
the answer follows, the sample is refused rather than masked wrongly.

Dimensions: T tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdflow_core.contracts import TokenSequence
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.conversations import Conversation
from kdflow_core.data.messages import Message, SampleError

THOUGHTS = re.compile(r"</?think>")
OPENED = re.compile(r"(<(\w+)>|\[(\w+)\])\s*$")


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A turn to be learned: its message, its prompt, and the text through it alone."""

    number: int
    message: Message
    prompt: str
    through: str
    last: bool


class Renderer:
    """Renders conversations for one model; `ignored` counts fields that its template leaves out."""

    def __init__(self, chat: ChatFormat, *, supervise: Literal["all", "last"]) -> None:
        self.chat = chat
        self._supervise = supervise
        self.ignored: Counter[str] = Counter()

    def render(self, conversation: Conversation) -> TokenSequence:
        """Ids and mask; nothing is supervised where the answer is still to be written.

        Raises SampleError, which names what is in the way.
        """
        if not self.chat.has_template:
            return self._plain(conversation)
        self.chat.refuse_control_text([*conversation.messages, *_as_messages(conversation.tools)])
        messages, text = self._spelling(conversation)
        if conversation.lacks_answer:
            return _sequence(self.chat.ids(text), [])
        learned = self._learned(conversation)
        turns = []
        for number in sorted(learned, reverse=True):  # the last one may mend the text
            prompt = self._text(conversation, messages[:number], prompt=True)
            last = number == len(messages) - 1
            if last and not text.startswith(prompt):
                text = _continued(conversation.messages[number], prompt, text)
            if not text.startswith(prompt):
                raise _mismatch(number, "renders its prompt differently once the answer follows")
            through = text if last else self._text(conversation, messages[: number + 1])
            turns.append(
                _Turn(
                    number=number,
                    message=conversation.messages[number],
                    prompt=prompt,
                    through=through,
                    last=last,
                )
            )
        _check_answers(conversation, learned, text)
        self.ignored.update("name" for m in messages if "name" in m and m["name"] not in text)
        return self._tokenized(text, turns[::-1])

    def _text(
        self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool = False
    ) -> str:
        return conversation.as_read(self._rendered(conversation, messages, prompt=prompt))

    def _rendered(
        self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool
    ) -> str:
        return self.chat.text(
            messages, prompt=prompt, tools=conversation.tools, answer=conversation.label
        )

    def learned_answers(self, conversation: Conversation) -> list[str]:
        """The answers that `render` supervises, as the messages have them."""
        if conversation.lacks_answer:
            return []
        numbers = sorted(self._learned(conversation)) if self.chat.has_template else [-1]
        return [str(conversation.messages[i]["content"]) for i in numbers]

    def _learned(self, conversation: Conversation) -> set[int]:
        """The numbers of the messages that are learned from. Raises SampleError `empty`."""
        turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        chosen = turns if self._supervise == "all" else turns[-1:]
        learned = set(chosen) - conversation.unsupervised
        if not learned:
            raise SampleError("empty", "every answer of a sample has the weight 0")
        return learned

    def _spelling(self, conversation: Conversation) -> tuple[list[Message], str]:
        """The messages in the form that the template renders, and what it renders: arguments of
        calls as values or as JSON text, no text beside them as empty text or as none, contents as
        text or as parts.

        Raises SampleError `template_error`, or `template_drops` where none of these does.
        """
        failures: list[SampleError] = []
        for messages in _spellings(conversation.messages):
            try:
                text = self._rendered(conversation, messages, prompt=conversation.lacks_answer)
                _check_context(conversation, text)  # before what the template writes joins it
            except SampleError as error:
                failures.append(error)
                continue
            return messages, conversation.as_read(text)
        # What is left out says more than how a template fails on a form that it does not take.
        raise next((f for f in failures if f.reason == "template_drops"), failures[0])

    def _tokenized(self, text: str, turns: Sequence[_Turn]) -> TokenSequence:
        ids = self.chat.ids(text)
        begins = [self.chat.ids(turn.prompt) for turn in turns]
        if all(ids[: len(head)] == head for head in begins):
            starts = [len(head) for head in begins]
            through = [ids if turn.last else self.chat.ids(turn.through) for turn in turns]
        else:
            ids, starts, through = self._in_pieces(text, turns)
        spans = []
        for turn, begin, ids_through in zip(turns, starts, through, strict=True):
            end = self._answer_end(ids_through, begin, turn)
            if ids[begin:end] != ids_through[begin:end]:
                raise _mismatch(turn.number, "renders an answer differently once others follow it")
            if ids[end : end + 1] and ids[end] in self.chat.end_ids:
                end += 1
            elif turn.last and (closing := self.chat.closing_id(turn.message)) is not None:
                ids, end = [*ids[:end], closing], end + 1
            spans.append((begin, end))
        return _sequence(ids, spans)

    def _answer_end(self, ids: list[int], begin: int, turn: _Turn) -> int:
        """Where an answer that begins at `begin` ends in the ids through its turn: before the token
        that ends the turn, or behind the last one that is the message's.
        """
        ends, decode = self.chat.end_ids, self.chat.decode
        found = next((i for i in range(begin, len(ids)) if ids[i] in ends), None)
        if found is not None:
            rest = decode(ids[found + 1 :], special=False)
            if rest.strip():
                raise SampleError(
                    "ends_inside",
                    f"the chat template writes {decode([ids[found]])!r}, which ends a turn, inside "
                    f"an answer; {rest[:80]!r} would never be generated",
                )
            return found
        end = len(ids)
        if not turn.message["content"][-1:].isspace():
            while end > begin and decode([ids[end - 1]]).isspace():
                end -= 1  # the template's own
        return end

    def _in_pieces(
        self, text: str, turns: Sequence[_Turn]
    ) -> tuple[list[int], list[int], list[list[int]]]:
        """Ids, where the turns begin in them, and the ids through each: the text is cut where the
        assistant begins to write. Whole, tokens would reach over these places (a newline at the
        beginning of an answer joins the prompt's last one), which no generated text has.
        """
        ids: list[int] = []
        starts, through, cut = [], [], 0
        for turn in turns:
            piece = text[cut : len(turn.prompt)]
            ids += self.chat.ids_behind(piece) if cut else self.chat.ids(piece)
            cut = len(turn.prompt)
            starts.append(len(ids))
            through.append([*ids, *self.chat.ids_behind(turn.through[cut:])])
        ids += self.chat.ids_behind(text[cut:])
        decode = self.chat.decode
        if decode(ids) != decode(self.chat.ids(text)):
            raise SampleError(
                "prefix_mismatch",
                "a token reaches from the prompt into the answer, and this tokenizer cannot write "
                "them apart; let answers begin with a letter",
            )
        return ids, starts, through

    def _plain(self, conversation: Conversation) -> TokenSequence:
        """Prompt and completion side by side, for models without a chat template."""
        roles = [m["role"] for m in conversation.messages]
        if roles not in (["user", "assistant"], ["user"]):
            raise SampleError(
                "no_chat_template",
                "the tokenizer has no chat template and the sample is more than a prompt and a "
                "completion; set chat_template.template",
            )
        texts = [m["content"] for m in conversation.messages]
        ids = self.chat.ids(texts[0])
        bos = self.chat.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self._adds_bos:
            ids = [bos, *ids]
        if conversation.lacks_answer:
            return _sequence(ids, [])
        begin, ends = len(ids), self.chat.end_ids
        ids = [*ids, *(self.chat.ids_behind(texts[1]) if ids else self.chat.ids(texts[1]))]
        if any(i in ends for i in ids[begin:-1]):
            raise SampleError("special_text", "a completion has an end-of-text token inside")
        closing = self.chat.closing_id(conversation.messages[-1])
        if ids[-1] not in ends and closing is not None:
            ids.append(closing)
        return _sequence(ids, [(begin, len(ids))])

    @property
    def _adds_bos(self) -> bool:
        return bool(self.chat.tokenizer("a")["input_ids"][0] == self.chat.tokenizer.bos_token_id)


def _sequence(ids: list[int], spans: Sequence[tuple[int, int]]) -> TokenSequence:
    supervised_T = np.zeros(len(ids), bool)
    for begin, end in spans:
        supervised_T[begin:end] = True
    supervised_T[:1] = False  # no state predicts the first token
    return TokenSequence(ids_T=np.array(ids, np.int32), supervised_T=supervised_T)


def _as_messages(tools: Sequence[Message]) -> list[Message]:
    return [{"role": "tools", "content": tool} for tool in tools]


def _mismatch(number: int, what: str) -> SampleError:
    return SampleError(
        "prefix_mismatch",
        f"message {number + 1}: the chat template {what}; set data.supervise=last, or a "
        "chat_template whose rendering only ever appends",
    )


def _continued(message: Message, prompt: str, text: str) -> str:
    """The text, where the prompt opens a block of thoughts that the template leaves out of the
    answer: with the message's own thoughts in it.

    Raises SampleError `no_reasoning` for a message that has none, `prefix_mismatch` elsewhere.
    """
    opened = OPENED.search(prompt)
    content, thoughts = message["content"], message.get("reasoning_content")
    if opened is None or not text.startswith(prompt[: opened.start()]):
        raise _mismatch_last(prompt)
    tag = opened.group(1)
    close = f"</{opened.group(2)}>" if opened.group(2) else f"[/{opened.group(3)}]"
    if thoughts:
        body = f"{thoughts.strip()}\n{close}\n\n{content.lstrip()}"
    elif content.lstrip().startswith(tag) and close in content:
        body = content.lstrip().removeprefix(tag).lstrip("\n")
    else:
        raise SampleError(
            "no_reasoning",
            f"the chat template's prompt ends with {tag!r}, and the answer has no such part: "
            "give rows with `reasoning_content`, let the teacher write answers (data.answers), or "
            "have the prompt not open it (for many: chat_template.args={enable_thinking: false})",
        )
    said = content.rpartition(close)[2].strip() or content.strip()
    _, found, tail = text.rpartition(said) if said else ("", "", "")
    if not found:
        raise _mismatch_last(prompt)
    return prompt + body.rstrip() + tail


def _mismatch_last(prompt: str) -> SampleError:
    return SampleError(
        "prefix_mismatch",
        f"the chat template's prompt ends with {prompt[-40:]!r}, and it does not render an answer "
        "behind that; set a chat_template whose rendering only ever appends",
    )


def _spellings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The forms in which templates take messages, the usual one first."""
    yield list(messages)
    if any(m.get("tool_calls") for m in messages):
        for text_arguments, none in ((False, True), (True, False), (True, True)):
            yield [_spelled(m, text_arguments=text_arguments, none=none) for m in messages]
    # Templates of models with media take the content as parts alone.
    yield [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _spelled(message: Message, *, text_arguments: bool, none: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if text_arguments:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    content = None if none and not message["content"].strip() else message["content"]
    return {**message, "content": content, "tool_calls": calls}


def _check_context(conversation: Conversation, text: str) -> None:
    """Raises SampleError `template_drops` for what the text lacks of tools, calls and questions."""
    for tool in conversation.tools:
        told = [str(tool["function"].get(key) or "") for key in ("name", "description")]
        if not all(_contains(text, part) for part in told):
            raise _drops(f"the tool '{told[0]}'; give a template that knows `tools`")
    for number, message in enumerate(conversation.messages, start=1):
        if message["role"] != "assistant" and not _contains(text, message["content"]):
            raise _drops(f"message {number} ({message['role']}); give a template that renders it")
        for call in message.get("tool_calls", ()):
            leaves = [call["function"]["name"], *_leaves(call["function"]["arguments"])]
            if not all(_contains(text, leaf) for leaf in leaves):
                raise _drops(f"the tool calls of message {number}")


def _check_answers(conversation: Conversation, learned: set[int], text: str) -> None:
    """Raises SampleError `template_drops` for what the text does not have of the answers that are
    learned. Earlier ones are shortened on purpose.
    """
    for number in sorted(learned):
        message = conversation.messages[number]
        parts = [*THOUGHTS.split(message["content"]), str(message.get("reasoning_content", ""))]
        lost = next((part for part in parts if not _contains(text, part)), None)
        if lost is not None:
            last = number == len(conversation.messages) - 1
            remedy = "" if last else "set data.supervise=last, or "
            raise _drops(
                f"{lost.strip()[:80]!r} of message {number + 1} (assistant); {remedy}give a "
                "template that renders it"
            )


def _drops(what: str) -> SampleError:
    return SampleError("template_drops", f"the chat template leaves out {what}")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _contains(text: str, part: str) -> bool:
    """Whether a text has a part, as it is or escaped as JSON."""
    stripped = part.strip()
    if stripped in text:
        return True
    escaped = (json.dumps(stripped, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))
    return any(form in text for form in escaped) or " ".join(part.split()) in " ".join(text.split())
