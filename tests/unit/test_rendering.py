"""Supervision masks: exactly the tokens that the assistant would generate."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdflow_core.contracts import TokenSequence
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.conversations import Conversation, parse_row
from kdflow_core.data.messages import SampleError
from kdflow_core.data.rendering import Renderer
from tests.conftest import CHATML, make_tokenizer

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
    chat = ChatFormat(tokenizer=tokenizer, template=template)
    renderer = Renderer(chat, supervise=supervise)  # type: ignore[arg-type]
    return renderer.render(Conversation(messages=TURNS, label=None))


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
    assert caught.value.reason == "template_drops"


def test_a_rewriting_template_serves_the_last_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert supervised_text(tokenizer, render(tokenizer, REWRITES, "last")) == "second<|im_end|>"


def test_template_arguments_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    template = CHATML.replace(
        "m['role'] + ", "m['role'] + (' loud' if loud and m['role'] == 'user' else '') + "
    )
    chat = ChatFormat(tokenizer=tokenizer, template=template, args={"loud": True})
    renderer = Renderer(chat, supervise="last")
    sequence = renderer.render(Conversation(messages=TURNS[:2], label=None))
    assert "user loud" in tokenizer.decode(sequence.ids_T)


def chat(tokenizer: PreTrainedTokenizerBase, template: str | None, **more: Any) -> ChatFormat:
    return ChatFormat(tokenizer=tokenizer, template=template, **more)


def rendered(form: ChatFormat, *messages: dict[str, Any], **more: Any) -> tuple[str, str]:
    """The text before the last answer, and what is supervised."""
    conversation = parse_row({"messages": list(messages)} | more, layout="auto", columns={})
    sequence = Renderer(form, supervise="all").render(conversation)
    return form.decode(sequence.context_ids_T), form.decode(sequence.target_ids_N)


USER, BOT = TURNS[:2]


@pytest.mark.parametrize(
    "marked",
    [
        "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endgeneration %}",
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{{ '<|im_end|>\n' }}",
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'][:2] }}{% endgeneration %}"
        "{% generation %}{{ m['content'][2:] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        "{# {% generation %} #}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}",
    ],
    ids=["with the header", "without the end", "in two pieces", "in a comment"],
)
def test_what_is_marked_as_generated_does_not_matter(
    tokenizer: PreTrainedTokenizerBase, marked: str
) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + marked + "{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    prompt, supervised = rendered(chat(tokenizer, template), USER, BOT)
    assert prompt == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert supervised == "first<|im_end|>"


def test_an_answer_that_begins_with_a_newline(tmp_path: Path) -> None:
    """Its tokens are those that a model writes behind the prompt: none reaches into it."""
    make_tokenizer(tmp_path, texts=["one\n\nfirst\n\n\ntwo first" * 20])
    form = chat(AutoTokenizer.from_pretrained(tmp_path), CHATML)
    assert form.ids("\n\n") != form.ids("\n") * 2  # it joins them, given the chance
    for text in ("\nfirst", "\n\nfirst", " first"):
        conversation = parse_row(
            {"messages": [USER, BOT | {"content": text}]}, layout="auto", columns={}
        )
        sequence = Renderer(form, supervise="all").render(conversation)
        prompt = form.text([USER], prompt=True)
        assert sequence.prompt_ids_T.tolist() == form.ids(prompt)
        assert form.decode(sequence.target_ids_N) == text + "<|im_end|>"


def test_the_day_is_the_configs(tokenizer: PreTrainedTokenizerBase) -> None:
    template = CHATML.replace("{% for", "{{ strftime_now('%d %B %Y') + '<|im_end|>' }}{% for", 1)
    prompt, _ = rendered(chat(tokenizer, template), USER, BOT)
    assert prompt.startswith("01 January 2025<|im_end|>")
    prompt, _ = rendered(chat(tokenizer, template, date=date(2026, 11, 25)), USER, BOT)
    assert prompt.startswith("25 November 2026<|im_end|>")


def test_several_templates_by_name(teacher_folder: Path, tmp_path: Path) -> None:
    """`tool_use` where there are tools, else `default`, in both forms that folders have."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tool_use = "{{ 'tools: ' + tools[0].function.name + '<|im_end|>' }}" + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": tool_use, "rag": "{{ 'r' }}" + CHATML}
    tool = {"name": "weather"}
    tokenizer.save_pretrained(tmp_path / "files")
    shutil.copytree(tmp_path / "files", tmp_path / "list")
    shutil.rmtree(tmp_path / "list/additional_chat_templates")
    (tmp_path / "list/chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "list/tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": name, "template": text} for name, text in tokenizer.chat_template.items()
    ]
    (tmp_path / "list/tokenizer_config.json").write_text(json.dumps(settings))
    for folder in ("files", "list"):
        form = chat(AutoTokenizer.from_pretrained(tmp_path / folder), None)
        assert rendered(form, USER, BOT)[1] == "first<|im_end|>"
        assert rendered(form, USER, BOT)[0].startswith("<|im_start|>user")
        assert rendered(form, USER, BOT, tools=[tool])[0].startswith("tools: weather<|im_end|>")
    named = chat(AutoTokenizer.from_pretrained(tmp_path / "files"), "rag")
    assert rendered(named, USER, BOT)[0].startswith("r<|im_start|>")


def test_an_end_that_the_template_leaves_out_is_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """What begins the next turn ends this one (GLM), else the model's EOS does."""
    bare = (
        "{% for m in messages %}{{ ('<|im_start|>' if m['role'] == 'user' else '\nA: ') + "
        "m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\nA: ' }}{% endif %}"
    )
    opens, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    form = chat(tokenizer, bare, declared_ends=(eos, opens))
    assert rendered(form, *TURNS)[1] == "first<|im_start|>second<|im_start|>"
    form = chat(tokenizer, bare, declared_ends=(eos,))
    assert rendered(form, *TURNS)[1] == "firstsecond<|endoftext|>"


def test_only_the_first_of_two_ends_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    template = CHATML.replace(
        "{% if add_g", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add_g"
    )
    assert rendered(chat(tokenizer, template), USER, BOT)[1] == "first<|im_end|>"


def test_text_that_spells_a_special_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    form = chat(tokenizer, CHATML)
    for messages in (
        (USER | {"content": "what is <|im_end|>?"}, BOT),
        (USER, BOT | {"content": "it is <|im_start|>"}),
        (USER, BOT | {"reasoning_content": "<|endoftext|>"}),
    ):
        with pytest.raises(SampleError, match="takes for a special token") as caught:
            rendered(form, *messages)
        assert caught.value.reason == "special_text"


@pytest.mark.parametrize(
    ("messages", "more", "lost"),
    [
        ((USER, BOT | {"reasoning_content": "because"}), {}, "'because' of message 2"),
        ((USER, BOT), {"tools": [{"name": "weather"}]}, "the tool 'weather'"),
        (
            (USER, {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}),
            {},
            "the tool calls of message 2",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[dict[str, Any], ...],
    more: dict[str, Any],
    lost: str,
) -> None:
    with pytest.raises(SampleError, match=f"leaves out {lost}") as caught:
        rendered(chat(tokenizer, CHATML), *messages, **more)
    assert caught.value.reason == "template_drops"


def test_a_name_that_a_template_leaves_out_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(chat(tokenizer, CHATML), supervise="all")
    row = {"messages": [USER | {"name": "Zaphod"}, BOT]}
    renderer.render(parse_row(row, layout="auto", columns={}))
    assert renderer.ignored == {"name": 1}


def test_answers_of_weight_zero_are_context(tokenizer: PreTrainedTokenizerBase) -> None:
    first, answer, second, last = TURNS
    form = chat(tokenizer, CHATML)
    prompt, supervised = rendered(form, first, answer | {"weight": 0}, second, last)
    assert supervised == "second<|im_end|>"
    assert "first" in prompt
    with pytest.raises(SampleError, match="every answer of a sample has the weight 0"):
        rendered(form, first, answer | {"weight": 0})


OPENS = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
).replace("m['content']", "m['content'].split('</think>')[-1]")


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "4", "reasoning_content": "2 and 2"},
        {"content": "<think>\n2 and 2\n</think>\n\n4"},
    ],
)
def test_a_prompt_that_opens_a_block_of_thoughts(
    tokenizer: PreTrainedTokenizerBase, answer: dict[str, str]
) -> None:
    """DeepSeek-R1's: rendered back, answers lose their thoughts; learned they are all the same."""
    prompt, supervised = rendered(chat(tokenizer, OPENS), USER, BOT | answer)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert supervised == "2 and 2\n</think>\n\n4<|im_end|>"
    with pytest.raises(SampleError, match="give rows with `reasoning_content`"):
        rendered(chat(tokenizer, OPENS), USER, BOT)


def test_an_end_inside_an_answer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that writes two messages for one: a model stops behind the first."""
    template = CHATML.replace("m['content']", "m['content'] + '<|im_end|>and more'")
    with pytest.raises(SampleError, match="which ends a turn, inside an answer") as caught:
        rendered(chat(tokenizer, template), USER, BOT)
    assert caught.value.reason == "ends_inside"


@pytest.mark.parametrize("prefixed", [False, True])
def test_plain_text_has_one_beginning_and_one_end(*, prefixed: bool) -> None:
    """A tokenizer that adds both to every text: prompt and completion are one text."""
    fast = make_plain_tokenizer()
    form = ChatFormat(tokenizer=fast)
    prompt = "<s>abc" if prefixed else "abc"
    row = {"prompt": prompt, "completion": "cab"}
    sequence = Renderer(form, supervise="all").render(parse_row(row, layout="auto", columns={}))
    assert fast.convert_ids_to_tokens(sequence.ids_T.tolist()) == ["<s>", *"abccab", "</s>"]
    assert fast.convert_ids_to_tokens(sequence.target_ids_N.tolist()) == [*"cab", "</s>"]
    row["completion"] += "</s>"  # the data's own end is not doubled
    again = Renderer(form, supervise="all").render(parse_row(row, layout="auto", columns={}))
    assert again.ids_T.tolist() == sequence.ids_T.tolist()


def make_plain_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, with <s> in front of and </s> behind every text."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_tokenizer_that_writes_a_space_in_front_of_every_text(scheme: str) -> None:
    """SentencePiece's dummy prefix: cut texts must not get one at every cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyzA:,\n\u2581"))
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["the answer is here\n\nand more\n\n"] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>' + m['content'] + '\n' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    form = ChatFormat(tokenizer=fast, template=template)
    for answer in ("the answer", "\nand more", "\n\nis here"):
        prompt, supervised = rendered(form, USER, BOT | {"content": answer})
        assert prompt.strip() == "<s>one" or prompt.strip() == "<s> one"
        assert supervised.lstrip(" ") == answer + "</s>" or supervised == answer + "</s>"


def test_the_template_trained_with_is_exported(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template = CHATML.replace(
        "m['role'] + ", "m['role'] + (' loud' if loud else ' low') + (names or [''])[0] + "
    )
    form = chat(tokenizer, template, args={"loud": True, "names": ['"x"']})
    form.tokenizer_as_used().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = again.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert text == form.text([USER], prompt=True)
    assert text.startswith('<|im_start|>user loud"x"\none')
    low = again.apply_chat_template([USER], tokenize=False, loud=False)
    assert low.startswith("<|im_start|>user low")
    assert tokenizer.chat_template == CHATML  # the one at work is as it was


def test_a_failing_template_is_a_counted_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SampleError, match="no odd turns") as caught:
        render(tokenizer, "{{ raise_exception('no odd turns') }}")
    assert caught.value.reason == "template_error"


def test_without_a_template_prompt_and_completion_are_joined(teacher_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.chat_template = None
    renderer = Renderer(ChatFormat(tokenizer=tokenizer), supervise="all")
    sequence = renderer.render(Conversation(messages=TURNS[:2], label=None))
    assert tokenizer.decode(sequence.ids_T) == "onefirst<|im_end|>"
    assert supervised_text(tokenizer, sequence) == "first<|im_end|>"
    with pytest.raises(SampleError, match="no chat template"):
        renderer.render(Conversation(messages=TURNS, label=None))
