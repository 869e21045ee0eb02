"""How a model's conversations are written, and how a turn of its ends: one object for masks, every
generation, evaluation and export.
"""

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date  # noqa: N812 - the field has that name
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from kdflow_core.data.messages import Message, SampleError

# A text that no template changes, to see what stands around it.
PROBE = "kdflow"
SPACE_MARK = "\u2581"  # SentencePiece's space
PROBE_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": PROBE}}}


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """What finds any of some texts, the longest at a place; None where there are none."""
    if not texts:
        return None
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)))


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A tokenizer with the chat template that a model is used with, if it has one.

    `template` (Jinja text, or the name of one of the tokenizer's) replaces the tokenizer's own;
    `args` go to it, and so does a sample's gold `answer`; `date` is what a template takes for
    today. `declared_ends` are the ids that the model's files give for the end of a turn.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    date: Date = Date(2025, 1, 1)
    declared_ends: Sequence[int] = ()

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template at all."""
        return bool(self.template or self.tokenizer.chat_template)

    def template_text(self, *, tools: bool = False) -> str:
        """The template, of several the one that is for conversations (with `tools`).

        Raises SampleError `template_error` where none of several fits.
        """
        marks: list[Message] | None = [{}] if tools else None
        try:
            return str(self.tokenizer.get_chat_template(self.template, marks))
        except ValueError as error:
            raise SampleError(
                "template_error", f"the tokenizer's chat templates: {error}"
            ) from error

    def tokenizer_as_used(self) -> PreTrainedTokenizerBase:
        """The tokenizer with this chat template as its own, its arguments as defaults."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if self.has_template and (self.template or self.args):
            defaults = "".join(
                f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}"
                "{%- endif %}"
                for name, value in self.args.items()
            )
            own = tokenizer.chat_template
            if self.template is None and isinstance(own, dict):
                tokenizer.chat_template = {n: defaults + text for n, text in own.items()}
            else:
                tokenizer.chat_template = defaults + self.template_text()
        return tokenizer

    def text(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool,
        tools: Sequence[Message] = (),
        answer: str | None = None,
    ) -> str:
        """A conversation as text; as a `prompt`, with the beginning of the assistant's next turn.

        Raises SampleError `template_error`.
        """
        template = self.template_text(tools=bool(tools))
        try:
            text: Any = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                **{"answer": answer, "strftime_now": self._strftime, **self.args},
            )
        except Exception as error:  # Jinja runs the model author's code; any exception is possible
            raise SampleError("template_error", f"the chat template failed: {error}") from error
        return str(text)

    def _strftime(self, form: str) -> str:
        return self.date.strftime(form)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that has its special tokens in it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_behind(self, text: str) -> list[int]:
        """Token ids of a text that goes on behind another one: without a dummy prefix, where the
        tokenizer puts one at the beginning of a text.
        """
        # Behind a special token inside, a tokenizer may put a prefix too, wherever the text stands.
        first = None if self._added is None else self._added.search(text)
        begin = text if first is None else text[: first.end()]
        for mark in (self.tokenizer.eos_token, "\n", "x", "."):
            if mark is None:
                continue
            head, ids = self.ids(mark), self.ids(mark + text)
            # A mark that joins the text, or behind which a prefix comes too, is none. SentencePiece
            # reads its own sign for a space as one.
            said, wanted = (
                written.replace(SPACE_MARK, " ")
                for written in (self.decode(ids), self.decode(head) + begin)
            )
            if ids[: len(head)] == head and said.startswith(wanted):
                return ids[len(head) :]
        return self.ids(text)

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        return _any_of({str(t.content) for t in self.tokenizer.added_tokens_decoder.values()})

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of token ids, with `special` tokens or without."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a turn: those of the model's files, and the token that its template puts
        behind an answer.
        """
        ends = set(self.declared_ends)
        if not ends and self.tokenizer.eos_token_id is not None:
            ends = {int(self.tokenizer.eos_token_id)}
        written = self._written_end()
        return tuple(sorted(ends if written is None else ends | {written}))

    def _written_end(self) -> int | None:
        if not self.has_template:
            return None
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            _, found, behind = self.text(exchange, prompt=False).rpartition(PROBE)
        except SampleError:
            return None  # a template for other conversations than this
        first = next(iter(self.ids_behind(behind.lstrip())), None) if found else None
        return first if first in self._marks else None

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Ids of added tokens that are not white space."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(int(i) for i, token in added if str(token.content).strip())

    def closing_id(self, message: Message) -> int | None:
        """The id that ends a turn whose end the template leaves out: what it puts there when
        another message follows, else the model's EOS.
        """
        calls = bool(message.get("tool_calls"))
        return self._closing_call if calls else self._closing_answer

    @cached_property
    def _closing_answer(self) -> int | None:
        return self._closing({"role": "assistant", "content": PROBE}, "user")

    @cached_property
    def _closing_call(self) -> int | None:
        return self._closing(
            {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}, "tool"
        )

    def _closing(self, message: Message, follower: str) -> int | None:
        eos = self.tokenizer.eos_token_id
        default = eos if eos in self.end_ids else next(iter(self.end_ids), None)
        if not self.has_template:
            return default
        messages = [{"role": "user", "content": "a"}, message, {"role": follower, "content": "b"}]
        try:
            _, found, behind = self.text(messages, prompt=False).rpartition(PROBE)
        except SampleError:
            return default
        following = self.ids_behind(behind) if found else []
        return next((i for i in following if i in self.end_ids), default)

    def refuse_control_text(self, messages: Sequence[Message]) -> None:
        """Raises SampleError `special_text` where a message spells a special token: it would become
        one, and end or begin a turn.
        """
        if self._control is None:
            return
        for number, message in enumerate(messages, start=1):
            found = self._control.search(json.dumps(message, ensure_ascii=False))
            if found:
                raise SampleError(
                    "special_text",
                    f"message {number} ({message['role']}) contains {found.group()!r}, which the "
                    "tokenizer takes for a special token; take it out of the data",
                )

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {str(token.content) for token in added if token.special}
        # A quote or backslash would be escaped in what is searched.
        return _any_of({json.dumps(t, ensure_ascii=False)[1:-1] for t in texts if t.strip()})

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of more than n times as many has more than n
        tokens.
        """
        return max(map(len, self.tokenizer.get_vocab()))


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
