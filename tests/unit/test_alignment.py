"""Alignment by bytes of ids: real tokenizers, random splits, and what two templates write."""

import random
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdflow_core.alignment.boundaries import common_boundaries
from kdflow_core.alignment.class_maps import MAPS
from kdflow_core.alignment.classes import Vocabulary, fold
from kdflow_core.alignment.token_bytes import TokenBytes, token_bytes
from kdflow_core.alignment.turns import Reader, align
from kdflow_core.contracts import Alignment, TokenSequence
from kdflow_core.data.messages import SampleError
from kdflow_core.errors import ModelError
from tests.real_tokenizers import MAKERS, real_tokenizer

# Where tokens end, in bytes, counted by hand from what GPT-2's and Qwen's tokenizers cut.
EDGES = {
    "": ("", ""),
    "a": ("1", "1"),
    "  a": ("1 3", "1 3"),
    "hello ": ("5 6", "5 6"),
    "naïve café": ("2 6 12", "2 4 6 12"),
    "Ａ": ("1 2 3", "3"),
    "12345": ("3 5", "1 2 3 4 5"),
    "don't I'LL": ("3 5 7 8 10", "3 5 7 8 10"),
    "\n\n\n": ("2 3", "3"),
    "a\r\nb": ("1 2 3 4", "1 3 4"),
    "\ta\t": ("1 2 3", "2 3"),
    "    return x": ("1 2 3 10 12", "3 10 12"),
    "你好，世界": ("2 3 5 6 7 8 9 11 12 14 15", "6 9 15"),
    "한국어": ("2 3 4 5 6 7 8 9", "3 6 9"),
    "Привет": ("1 2 4 6 8 10 12", "4 8 12"),
    "مرحبا": ("2 4 5 6 8 10", "4 6 10"),
    "ไทย": ("2 3 5 6 8 9", "9"),
    "👍🏽": ("3 4 6 7 8", "4 8"),
    "🇩🇪": ("2 3 4 6 7 8", "4 8"),
    "a🙂b": ("1 3 5 6", "1 5 6"),
    "▁a": ("2 3 4", "2 3 4"),
    "Ġa": ("1 2 3", "2 3"),
    "<0x41>": ("1 2 3 5 6", "1 2 3 4 5 6"),
    "\xa0a": ("2 3", "2 3"),
    "\u200b": ("3", "3"),
    "\ufeffa": ("1 2 3 4", "3 4"),
    "a\x00b": ("1 2 3", "1 2 3"),
    "</s>": ("2 3 4", "2 3 4"),
}
TEXTS = (*EDGES, "e\u0301", "def f(x):\n    return  x + 1\n", "A wonderful day, isn't it?")


@lru_cache
def bytes_of(name: str) -> TokenBytes:
    return token_bytes(real_tokenizer(name), name)


def ids_of(name: str, text: str) -> list[int]:
    return list(real_tokenizer(name)(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", EDGES)
def test_tokens_end_where_they_do(text: str) -> None:
    for name, expected in zip(("gpt2", "qwen"), EDGES[text], strict=True):
        lengths = [len(bytes_of(name).spelled[i]) for i in ids_of(name, text)]
        assert list(accumulate(lengths)) == [int(end) for end in expected.split()], name


@pytest.mark.parametrize("name", MAKERS)
def test_ids_spell_the_text(name: str) -> None:
    """SentencePiece with its own space in front; where text is composed first, what it is then."""
    tokens = bytes_of(name)
    for text in TEXTS:
        if text == "e\u0301" and tokens.composes:
            text = "\u00e9"
        if name == "sentencepiece":
            if "\u2581" in text or text == "</s>":
                continue  # SentencePiece's own signs
            expected = b" " + text.encode() if text else b""
        else:
            expected = text.encode()
        assert tokens.spell(ids_of(name, text)) == expected, text


def test_special_tokens_have_no_bytes_and_added_text_has() -> None:
    tokenizer = real_tokenizer("deepseek")
    tokens = bytes_of("deepseek")
    end, user = tokenizer.convert_tokens_to_ids(["<｜end▁of▁sentence｜>", "<｜User｜>"])
    assert (tokens.spelled[end], end in tokens.special) == (b"", True)
    assert tokens.spelled[user].decode() == "<｜User｜>"


def test_of_two_tokens_of_the_same_bytes_the_encoders_counts() -> None:
    tokens = bytes_of("sentencepiece")
    tokenizer = real_tokenizer("sentencepiece")
    byte = tokenizer.convert_tokens_to_ids("<0x65>")
    assert tokens.spelled[byte] == b"e"
    assert tokens.id_of[b"e"] == tokenizer.convert_tokens_to_ids("e")


def test_tokenizers_that_lose_text_are_refused_by_name() -> None:
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match=r"the teacher's tokenizer cannot .* WordPiece loses"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=word_piece), "teacher")
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"the student's tokenizer cannot .*WordLevel with"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=plain), "student")


def split(rng: random.Random, size: int) -> list[int]:
    """Lengths of tokens that cut `size` bytes, some of them without any."""
    cuts = sorted(rng.sample(range(1, size), rng.randrange(size))) if size else []
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)] if size else []
    for _ in range(rng.randrange(3)):
        lengths.insert(rng.randrange(len(lengths) + 1), 0)
    return lengths


def brute_force(own: list[int], other: list[int]) -> tuple[set, set]:
    """Pairs and groups by loops over tokens: groups as the bytes that they spell."""
    begins = [
        {sum(lengths[:k]): k for k in range(len(lengths)) if lengths[k]} for lengths in (own, other)
    ]
    pairs = {(begins[0][b], begins[1][b]) for b in begins[0].keys() & begins[1].keys()}
    ends = sorted(begins[0].keys() & begins[1].keys() | ({sum(own)} if sum(own) else set()))
    return pairs, set(pairwise(ends))


def test_random_splits_against_loops() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        size = rng.randrange(12)
        own, other = split(rng, size), split(rng, size)
        common = common_boundaries(np.array(own, int), np.array(other, int))
        pairs, groups = brute_force(own, other)
        assert {tuple(pair) for pair in common.pairs_P2.tolist()} == pairs
        found = set()
        for a, b, c, d in common.groups_S4.tolist():
            assert sum(own[a:b]) == sum(other[c:d]) > 0
            assert sum(own[:a]) == sum(other[:c])
            found.add((sum(own[:a]), sum(own[:b])))
        assert found == groups
        if size:  # every token is in one group
            spans = common.groups_S4
            assert [spans[0, 0], spans[-1, 1], spans[0, 2], spans[-1, 3]] == [
                *(0, len(own)),
                *(0, len(other)),
            ]
            assert (spans[1:, 0] == spans[:-1, 1]).all()
            assert (spans[1:, 2] == spans[:-1, 3]).all()
        swapped = common_boundaries(np.array(other, int), np.array(own, int))
        assert {(b, a) for a, b in swapped.pairs_P2.tolist()} == pairs


def test_sides_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes on one side, 2 on the other"):
        common_boundaries(np.array([3]), np.array([1, 1]))


def reader(name: str) -> Reader:
    return Reader(tokens=bytes_of(name), end_ids=frozenset({real_tokenizer(name).eos_token_id}))


def sequence(name: str, *parts: tuple[str, bool], end: bool = True) -> TokenSequence:
    """Parts of text, with whether they are supervised; behind each that is, the end of a turn."""
    ids, mask = [], []
    for text, supervised in parts:
        own = ids_of(name, text)
        own += [real_tokenizer(name).eos_token_id] * (supervised and end)
        ids += own
        mask += [supervised] * len(own)
    mask[:1] = [False]
    return TokenSequence(ids_T=np.array(ids, np.int32), supervised_T=np.array(mask, bool))


def spelled(name: str, one: TokenSequence, rows: range) -> bytes:
    return bytes_of(name).spell(one.target_ids_N[rows.start : rows.stop])


def assert_same_text(
    names: tuple[str, str], sides: tuple[TokenSequence, TokenSequence], found: Alignment
) -> None:
    """Every span spells one text on both sides, with a tokenizer's own space in front or not."""
    for a, b, c, d in found.spans_S4.tolist():
        own = spelled(names[0], sides[0], range(a, b))
        other = spelled(names[1], sides[1], range(c, d))
        assert own == other or b" " + own == other or own == b" " + other
    begins = {(a, c) for a, _, c, _ in found.spans_S4.tolist()}
    pairs = {tuple(pair) for pair in found.pairs_P2.tolist()}
    assert len(pairs) == len(found.pairs_P2)
    assert len(begins - pairs) <= 1  # that of a group that begins with a lone space


@pytest.mark.parametrize("teacher", ["qwen", "sentencepiece", "deepseek"])
@pytest.mark.parametrize("student", ["gpt2", "sentencepiece"])
def test_turns_of_two_tokenizers(student: str, teacher: str) -> None:
    answers = ["Hello   wörld 你好!", "def f():\n    return '🙂'"]
    parts = [("question", False), (answers[0], True), ("\nmore\n", False), (answers[1], True)]
    sides = (sequence(student, *parts), sequence(teacher, *parts))
    found = align(*sides, (reader(student), reader(teacher)), answers)
    assert_same_text((student, teacher), sides, found)
    ends = [
        np.flatnonzero(one.target_ids_N == real_tokenizer(name).eos_token_id).tolist()
        for name, one in zip((student, teacher), sides, strict=True)
    ]
    assert {(a, b) for a, b in zip(*ends, strict=True)} <= {tuple(p) for p in found.pairs_P2}
    text = b"".join(spelled(student, sides[0], range(a, b)) for a, b, _, _ in found.spans_S4)
    assert text.replace(b" ", b"") == "".join(answers).encode().replace(b" ", b"")


def test_one_tokenizer_on_both_sides_pairs_every_row() -> None:
    one = sequence("gpt2", ("a question", False), ("An answer.", True))
    found = align(one, one, (reader("gpt2"),) * 2, ["An answer."])
    rows = range(len(one.target_ids_N))
    assert found.pairs_P2.tolist() == [[row, row] for row in rows]
    assert found.spans_S4.tolist() == [[row, row + 1, row, row + 1] for row in rows]


def test_marks_that_one_template_writes_pair_with_nothing() -> None:
    own = sequence("gpt2", ("q", False), ("An answer", True))
    other = sequence("qwen", ("q", False), ("<think>\n\n</think>\n\nAn answer\n", True))
    found = align(own, other, (reader("gpt2"), reader("qwen")), [" An answer\n"])
    assert_same_text(("gpt2", "qwen"), (own, other), found)
    first = spelled("qwen", other, range(found.spans_S4[0, 2], found.spans_S4[0, 3]))
    assert first == b"An"
    assert found.pairs_P2[-1].tolist() == [len(s.target_ids_N) - 1 for s in (own, other)]


def test_a_cut_answer_has_no_end_and_no_last_group() -> None:
    parts = [("q", False), ("An answer", True)]
    own, other = (sequence(name, *parts, end=False) for name in ("gpt2", "qwen"))
    found = align(own, other, (reader("gpt2"), reader("qwen")), ["An answer"])
    assert len(found.pairs_P2) == 2
    assert len(found.spans_S4) == 1


def test_an_answer_that_begins_the_sequence() -> None:
    """Nothing predicts its first token."""
    own, other = (sequence(name, ("An answer.", True)) for name in ("gpt2", "qwen"))
    found = align(own, other, (reader("gpt2"), reader("qwen")), ["An answer."])
    assert_same_text(("gpt2", "qwen"), (own, other), found)
    assert spelled("gpt2", own, range(found.spans_S4[0, 0], found.spans_S4[0, 1])) == b" answer"


def test_samples_that_do_not_say_the_same_are_refused_by_reason() -> None:
    readers = (reader("gpt2"), reader("qwen"))
    own = sequence("gpt2", ("q", False), ("e\u0301", True))
    other = sequence("qwen", ("q", False), ("e\u0301", True))  # which composes it
    with pytest.raises(SampleError, match="does not stand in both as it is") as caught:
        align(own, other, readers, ["e\u0301"])
    assert caught.value.reason == "bytes_disagree"
    two = sequence("gpt2", ("q", False), ("a", True), ("q", False), ("b", True))
    with pytest.raises(SampleError, match="student's tokens have 2 and the teacher's 1") as caught:
        align(two, other, readers, ["e\u0301"])
    assert caught.value.reason == "runs_disagree"


def vocabulary(name: str) -> Vocabulary:
    tokens = bytes_of(name)
    ends = [real_tokenizer(name).eos_token_id]
    return Vocabulary(
        tokenizer=real_tokenizer(name), tokens=tokens, end_ids=ends, size=len(tokens.spelled)
    )


@pytest.mark.parametrize(
    "pair", [("gpt2", "qwen"), ("sentencepiece", "gpt2"), ("gpt2", "deepseek")]
)
def test_every_token_is_in_the_class_of_a_shared_token_that_it_begins_with(
    pair: tuple[str, str],
) -> None:
    student, teacher = (vocabulary(name) for name in pair)
    classes = fold(student, teacher)
    shared = student.tokens.id_of.keys() & teacher.tokens.id_of.keys()
    assert classes.shared == len(shared)
    root = {int(classes.student_V[student.tokens.id_of[token]]): token for token in shared}
    spaces = classes.student_V[student.tokens.id_of[b" "]]
    root[int(spaces)] = b" "
    for side, own in ((student, classes.student_V), (teacher, classes.teacher_W)):
        assert len(own) == side.size
        assert own.max() < classes.count
        for number, token in enumerate(side.tokens.spelled):
            if token[:1] in shared:
                assert token.startswith(root[int(own[number])])
    end = {
        int(own[side.end_ids[0]])
        for side, own in ((student, classes.student_V), (teacher, classes.teacher_W))
    }
    assert len(end) == 1
    assert not end & root.keys()


def test_classes_do_not_go_by_the_order_of_ids() -> None:
    student, teacher = vocabulary("sentencepiece"), vocabulary("gpt2")
    one, other = fold(student, teacher), fold(teacher, student)
    assert one.count == other.count
    sizes = [np.bincount(c, minlength=one.count) for c in (one.student_V, other.teacher_W)]
    np.testing.assert_array_equal(*sizes)


PIECES = (
    *("Hello", " world", "don't", "naïve", "e\u0301", "\u212b", "ﬁ", "12345", " 3.14", "</s>"),
    *("    ", "  ", " ", "\t", "\n", "\n\n\n", "\r\n", "\xa0", "\u200b", "\ufeff", "\u2581", ""),
    *("def f(x):", " return x", "{'a': [1]}", "//", "<think>", "<|im_end|>", "<0x41>", "[INST]"),
    *("你好，世界", "한국어", "Привет", "مرحبا", "नमस्ते", "ไทย", "🙂", "👍🏽", "🇩🇪", "👩\u200d👧"),
)


def mixed_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(count)]


@pytest.mark.parametrize("teacher", ["qwen", "sentencepiece", "deepseek", "gpt2"])
@pytest.mark.parametrize("student", ["gpt2", "sentencepiece", "qwen"])
def test_whatever_is_written_no_row_meets_another_text(student: str, teacher: str) -> None:
    """What stands before the tokens of a pair is the same text on both sides, and what cannot be
    aligned says why.
    """
    reasons = []
    for text in mixed_texts(150, seed=len(student) * len(teacher)):
        sides = tuple(sequence(name, ("q:", False), (text, True)) for name in (student, teacher))
        try:
            found = align(*sides, (reader(student), reader(teacher)), [text])
        except SampleError as error:
            reasons.append(error.reason)
            continue
        for own, other in found.pairs_P2.tolist():
            before = [
                spelled(name, one, range(row)).strip(b" ")
                for name, one, row in zip((student, teacher), sides, (own, other), strict=True)
            ]
            assert before[0] == before[1]
        assert_same_text((student, teacher), sides, found)
    assert set(reasons) <= {"bytes_disagree"}
    assert len(reasons) < 100


@pytest.mark.parametrize("by", sorted(MAPS))
@pytest.mark.parametrize("pair", [("gpt2", "qwen"), ("qwen", "sentencepiece")])
def test_whatever_the_classes_a_shared_token_is_in_its_own_on_both_sides(
    by: str, pair: tuple[str, str]
) -> None:
    """And the others are where the map says."""
    student, teacher = (vocabulary(name) for name in pair)
    classes = MAPS[by](student, teacher)  # type: ignore[index]
    own, other = student.tokens, teacher.tokens
    for token in own.id_of.keys() & other.id_of.keys():
        mine, theirs = classes.student_V[own.id_of[token]], classes.teacher_W[other.id_of[token]]
        assert mine == theirs
    assert classes.student_V[student.end_ids[0]] == classes.teacher_W[teacher.end_ids[0]]
    tail = {classes.student_V[i] for t, i in own.id_of.items() if t not in other.id_of}
    if by == "shared_tail":
        tail |= {classes.teacher_W[i] for t, i in other.id_of.items() if t not in own.id_of}
        assert len(tail) == 1
    if by in {"byte_prefix", "first_piece"}:
        assert len(tail) == len(own.id_of.keys() - other.id_of.keys())  # each has a class
        begins = {int(classes.student_V[i]): token for token, i in own.id_of.items()}
        for token, number in other.id_of.items():
            root = begins.get(int(classes.teacher_W[number]))
            if root is not None:
                assert token.startswith(root)
            if by == "byte_prefix":
                ends = range(len(token), 0, -1)
                assert root == next((token[:k] for k in ends if token[:k] in own.id_of), None)
