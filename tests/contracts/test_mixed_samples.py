"""Samples of all kinds through pairs of real tokenizers: nothing crashes, what is dropped says why,
and no row meets another text.

Dimensions: N and M supervised tokens of student and teacher, P pairs, S spans.
"""

import json
import random
from collections import Counter
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from configs.schema.data import DataConfig
from kdflow_core.alignment.tokenizer_pair import TokenizerPair, vocabulary
from kdflow_core.contracts import Example
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.tokenization import Tally, ViewReader, tokenize
from storage.data_files import DataFiles
from tests.conftest import SilentReporter
from tests.real_tokenizers import real_tokenizer

PAIRS = (
    ("gpt2", "qwen"),
    ("qwen", "deepseek"),
    ("sentencepiece", "qwen"),
    ("qwen", "sentencepiece"),
    ("deepseek", "gpt2"),
)
REASONS = {"bytes_disagree", "runs_disagree", "special_text", "empty"}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + (m['content'] or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
SCRIPTS = {
    "chinese": "你好世界今天天气很好我们去公园散步吧数学和物理都有意思",
    "arabic": "مرحبا بالعالم كيف حالك اليوم الطقس جميل جدا في المدينة",
    "emoji": "🙂👍🏽🇩🇪👩‍👧🎉🤖❤️",
    "accents": "naïve café e\u0301 Å ﬁ ½ ß",
}
KINDS = ("english", "code", "tools", "empty", "marks", *SCRIPTS)


def text(rng: random.Random, kind: str) -> str:
    if kind in SCRIPTS:
        return "".join(rng.choices(SCRIPTS[kind] + "  \n1", k=rng.randrange(1, 40)))
    if kind == "empty":
        return rng.choice(["", " ", "\n", "\t\n "])
    if kind == "marks":
        return " ".join(rng.choices(["</s>", "<0x41>", "▁", "<think>", "\u200b", "x", "\x00"], k=5))
    lines = topics[rng.choice(sorted(topics))].splitlines()
    begin = rng.randrange(len(lines))
    found = lines[begin : begin + rng.randrange(1, 5)]
    if kind == "code":
        found = [f"def f_{len(line)}(x):\n\treturn  {line!r}" for line in found]
    return "\n".join(found)


def row(rng: random.Random) -> dict[str, object]:
    kind = rng.choice(KINDS)
    messages: list[dict[str, object]] = []
    for _ in range(rng.randrange(1, 3)):
        messages.append({"role": "user", "content": text(rng, rng.choice(KINDS))})
        messages.append({"role": "assistant", "content": text(rng, kind)})
    if kind != "tools":
        return {"messages": messages}
    function = {"name": "look_up", "arguments": {"what": text(rng, rng.choice(KINDS))}}
    messages[1]["tool_calls"] = [{"type": "function", "function": function}]
    messages[2:2] = [
        {"role": "tool", "content": text(rng, "english")},
        {"role": "assistant", "content": text(rng, "english")},
    ]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    return {"messages": messages, "tools": [tool]}


def accent_behind_an_escape() -> dict[str, object]:
    """The accent composes with a letter that the template alone writes: the `n` of a new line."""
    function = {"name": "look_up", "arguments": {"what": "x\n\u0301y"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    last = {"role": "assistant", "content": "Yes."}
    return {
        "messages": [{"role": "user", "content": "?"}, call, {"role": "tool", "content": "y"}, last]
    }


@lru_cache
def bytes_of(name: str) -> list[bytes]:
    """Of every token, by what the tokenizer's own files say of it."""
    tokenizer = real_tokenizer(name)
    known = tokenizer.added_tokens_decoder
    byte = {letter: number for number, letter in bytes_to_unicode().items()}
    found = []
    for number in range(len(tokenizer)):
        piece = tokenizer.convert_ids_to_tokens(number)
        added = known.get(number)
        if added is not None:
            found.append(b"" if added.special else added.content.encode())
        elif name == "sentencepiece":
            is_byte = piece.startswith("<0x") and len(piece) == 6
            spelled = bytes([int(piece[1:5], 16)]) if is_byte else piece.encode()
            found.append(spelled.replace("\u2581".encode(), b" "))
        else:
            found.append(bytes(byte[letter] for letter in piece))
    return found


@lru_cache
def chat(name: str) -> ChatFormat:
    return ChatFormat(tokenizer=real_tokenizer(name), template=TEMPLATE)


def read(path: Path, pair: tuple[str, str]) -> tuple[list[Example], Tally]:
    sides = [
        vocabulary(chat(name).tokenizer, chat(name).end_ids, len(bytes_of(name)), name)
        for name in pair
    ]
    aligner = TokenizerPair(vocabularies=(sides[0], sides[1]))
    renderers = [Renderer(chat(name), supervise="all") for name in pair]
    sources = [{"type": "files", "path": str(path)}]
    config = {"sources": sources, "heldout_fraction": 0.1, "max_malformed_fraction": 1.0}
    tally = Tally()
    examples = tokenize(
        config=DataConfig.model_validate_json(json.dumps(config)),
        seed=0,
        files=DataFiles(),
        readers={
            "student": ViewReader(renderer=renderers[0], context_length=10**6),
            "teacher": ViewReader(renderer=renderers[1], context_length=10**6, aligner=aligner),
        },
        reporter=SilentReporter(),
        tally=tally,
    )
    return [example for _, example, _ in examples], tally


def spelled(name: str, ids: list[int]) -> bytes:
    """Without spaces, which a tokenizer may put in front of a text; SentencePiece's sign is one."""
    joined = b"".join(bytes_of(name)[i] for i in ids)
    return joined.replace("\u2581".encode(), b"").replace(b" ", b"")


def assert_same_text(pair: tuple[str, str], example: Example) -> None:
    """Spans spell the same on both sides, and so does what stands between them and a pair."""
    own_N, other_M = (s.target_ids_N.tolist() for s in (example.student, example.teacher))
    alignment = example.alignments["teacher"]
    ends: list[tuple[int, int]] = [(0, 0)]
    for begin, end, other_begin, other_end in alignment.spans_S4.tolist():
        assert begin >= ends[-1][0]
        assert other_begin >= ends[-1][1]
        same = spelled(pair[0], own_N[begin:end]) == spelled(
            pair[1], other_M[other_begin:other_end]
        )
        assert same, (own_N[begin:end], other_M[other_begin:other_end])
        ends.append((end, other_end))
    for own, other in alignment.pairs_P2.tolist():
        before = max(e for e in ends if e[0] <= own and e[1] <= other)
        between = own_N[before[0] : own], other_M[before[1] : other]
        assert spelled(pair[0], between[0]) == spelled(pair[1], between[1]), between


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_samples_of_all_kinds(tmp_path: Path, pair: tuple[str, str], count: int) -> None:
    rng = random.Random(len(pair[0]))
    path = tmp_path / "mixed.jsonl"
    rows = [row(rng) for _ in range(count - 1)] + [accent_behind_an_escape()]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    examples, tally = read(path, pair)
    dropped = sum(tally.dropped.values(), Counter[str]())
    assert len(examples) + dropped.total() == count
    assert set(dropped) <= REASONS, dropped
    assert len(examples) > 0.5 * count, dropped
    for example in examples:
        assert_same_text(pair, example)
    pairs = sum(len(example.alignments["teacher"].pairs_P2) for example in examples)
    assert pairs > 0.5 * sum(len(example.student.target_ids_N) for example in examples)
