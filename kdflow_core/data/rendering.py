"""A conversation as token ids with a supervision mask, by the tokenizer's chat template.

The mask comes from the template's own assistant mask where it has one (`{% generation %}`), else
from token prefixes: the prompt up to an assistant turn, rendered alone, must be a prefix of the
whole. Where a template rewrites history the prefix does not match, and the sample is refused
rather than masked wrongly.

Dimensions: T tokens.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdflow_core.contracts import TokenSequence
from kdflow_core.data.conversations import Conversation, SampleError


class Renderer:
    """Renders conversations for one model.

    A template may read `answer`, the sample's gold answer (or none): a teacher's that tells it what
    the student does not see.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        template_args: Mapping[str, Any],
        supervise: Literal["all", "last"],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template or tokenizer.chat_template
        self._args = dict(template_args)
        self._supervise = supervise
        self._has_assistant_mask = "{% generation" in (self._template or "").replace("{%-", "{%")
        self._end_ids = end_of_turn_ids(tokenizer)

    def render(self, conversation: Conversation) -> TokenSequence:
        """Ids and mask. Raises SampleError `prefix_mismatch` or `template_error`."""
        if self._template is None:
            return self._render_plain(conversation)
        messages, answer = list(conversation.messages), conversation.answer
        if self._has_assistant_mask:
            return self._render_with_assistant_mask(messages, answer)
        ids = self._ids(messages, answer, prompt=False)
        supervised_T = np.zeros(len(ids), bool)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for turn in turns if self._supervise == "all" else turns[-1:]:
            begin, end = self._span(messages, answer, turn, ids)
            supervised_T[begin:end] = True
        return TokenSequence(ids_T=np.array(ids, np.int32), supervised_T=supervised_T)

    def _span(
        self, messages: list[dict[str, str]], answer: str | None, turn: int, ids: list[int]
    ) -> tuple[int, int]:
        """Where the tokens that the assistant would generate in this turn begin and end."""
        prompt = self._ids(messages[:turn], answer, prompt=True)
        through = ids
        if turn + 1 < len(messages):
            through = self._ids(messages[: turn + 1], answer, prompt=False)
        if ids[: len(prompt)] != prompt or ids[: len(through)] != through:
            raise SampleError(
                "prefix_mismatch",
                "the chat template renders the prompt differently once the answer follows; "
                "set data.supervise=last, or a chat_template whose rendering only ever appends",
            )
        end = len(through)
        # The template may add white space behind the end-of-turn token; no model generates that.
        ends = [i for i in range(len(prompt), end) if through[i] in self._end_ids]
        return len(prompt), (ends[-1] + 1 if ends else end)

    def _render_with_assistant_mask(
        self, messages: list[dict[str, str]], answer: str | None
    ) -> TokenSequence:
        encoded = self._apply(
            messages, answer, add_generation_prompt=False, return_assistant_tokens_mask=True
        )
        supervised_T = np.array(encoded["assistant_masks"], bool)
        if not supervised_T.any():
            raise SampleError("template_error", "the template's assistant mask is empty")
        if self._supervise == "last":
            gaps = np.flatnonzero(np.diff(np.flatnonzero(supervised_T)) > 1)
            if len(gaps):
                supervised_T[: np.flatnonzero(supervised_T)[gaps[-1] + 1]] = False
        supervised_T[0] = False
        return TokenSequence(
            ids_T=np.array(encoded["input_ids"], np.int32), supervised_T=supervised_T
        )

    def _render_plain(self, conversation: Conversation) -> TokenSequence:
        """Prompt and completion side by side, for models without a chat template."""
        roles = [m["role"] for m in conversation.messages]
        if roles != ["user", "assistant"]:
            raise SampleError(
                "no_chat_template",
                "the tokenizer has no chat template and the sample is more than a prompt and a "
                "completion; set chat_template.template",
            )
        prompt, completion = (m["content"] for m in conversation.messages)
        head = self._tokenizer(prompt)["input_ids"]
        tail = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        eos = self._tokenizer.eos_token_id
        ids = [*head, *tail, *([] if eos is None else [eos])]
        supervised_T = np.arange(len(ids)) >= max(len(head), 1)
        return TokenSequence(ids_T=np.array(ids, np.int32), supervised_T=supervised_T)

    def _ids(
        self, messages: list[dict[str, str]], answer: str | None, *, prompt: bool
    ) -> list[int]:
        return list(self._apply(messages, answer, add_generation_prompt=prompt)["input_ids"])

    def _apply(self, messages: list[dict[str, str]], answer: str | None, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=True,
                return_dict=True,
                **options,
                **{"answer": answer, **self._args},
            )
        except Exception as error:  # Jinja runs the model author's code; any exception is possible
            raise SampleError("template_error", f"the chat template failed: {error}") from error


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an assistant's turn: EOS and the usual end-of-turn tokens, where present."""
    known = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "</s>")
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in known if token in vocabulary}
    return frozenset(ids | ({tokenizer.eos_token_id} - {None}))
