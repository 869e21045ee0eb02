"""Supervision masks: exactly the tokens that the assistant would generate."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdflow_core.contracts import TokenSequence
from kdflow_core.data.conversations import Conversation, SampleError
from kdflow_core.data.rendering import Renderer
from tests.conftest import CHATML

TURNS = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
)
MASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the content of all assistant turns but the last, as reasoning templates do with thoughts.
REWRITES = CHATML.replace(
    "m['content']", "('' if m['role'] == 'assistant' and not loop.last else m['content'])"
)


@pytest.fixture(scope="module")
def tokenizer(teacher_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(teacher_folder)


def render(
    tokenizer: PreTrainedTokenizerBase, template: str | None, supervise: str = "all"
) -> TokenSequence:
    renderer = Renderer(
        tokenizer=tokenizer, template=template, template_args={}, supervise=supervise
    )  # type: ignore[arg-type]
    return renderer.render(Conversation(messages=TURNS, answer=None))


def supervised_text(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> str:
    return tokenizer.decode(sequence.target_ids_N)


@pytest.mark.parametrize("template", [CHATML, MASKED], ids=["by prefix", "by generation tag"])
def test_mask_covers_answers_and_end_of_turn_only(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    sequence = render(tokenizer, template)
    assert supervised_text(tokenizer, sequence) == "first<|im_end|>second<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MASKED], ids=["by prefix", "by generation tag"])
def test_last_turn_alone(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    sequence = render(tokenizer, template, "last")
    assert supervised_text(tokenizer, sequence) == "second<|im_end|>"
    assert tokenizer.decode(sequence.prompt_ids_T).endswith(
        "two<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_rewrites_history_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SampleError, match=r"set data\.supervise=last") as caught:
        render(tokenizer, REWRITES)
    assert caught.value.reason == "prefix_mismatch"


def test_a_rewriting_template_serves_the_last_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert supervised_text(tokenizer, render(tokenizer, REWRITES, "last")) == "second<|im_end|>"


def test_template_arguments_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    template = CHATML.replace(
        "m['role'] + ", "m['role'] + (' loud' if loud and m['role'] == 'user' else '') + "
    )
    renderer = Renderer(
        tokenizer=tokenizer, template=template, template_args={"loud": True}, supervise="last"
    )
    sequence = renderer.render(Conversation(messages=TURNS[:2], answer=None))
    assert "user loud" in tokenizer.decode(sequence.ids_T)


def test_a_failing_template_is_a_counted_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SampleError, match="no odd turns") as caught:
        render(tokenizer, "{{ raise_exception('no odd turns') }}")
    assert caught.value.reason == "template_error"


def test_without_a_template_prompt_and_completion_are_joined(teacher_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.chat_template = None
    renderer = Renderer(tokenizer=tokenizer, template=None, template_args={}, supervise="all")
    sequence = renderer.render(Conversation(messages=TURNS[:2], answer=None))
    assert tokenizer.decode(sequence.ids_T) == "onefirst<|im_end|>"
    assert supervised_text(tokenizer, sequence) == "first<|im_end|>"
    with pytest.raises(SampleError, match="no chat template"):
        renderer.render(Conversation(messages=TURNS, answer=None))
