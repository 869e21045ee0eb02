"""What one model has written, in the other one's tokens."""

from functools import lru_cache

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from kdflow_core.alignment.classes import Vocabulary
from kdflow_core.alignment.tokenizer_pair import TokenizerPair, vocabulary
from kdflow_core.alignment.translation import Translated, Translator, valid_text, with_answer
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.data.chat import ChatFormat
from tests.real_tokenizers import real_tokenizer


@lru_cache
def known(name: str) -> Vocabulary:
    tokenizer = real_tokenizer(name)
    size = max(tokenizer.get_vocab().values()) + 1
    return vocabulary(tokenizer, [tokenizer.eos_token_id], size, name)


def translator(student: str, teacher: str, limit: int = 256) -> Translator:
    tokenizers = {"student": real_tokenizer(student), "teacher": real_tokenizer(teacher)}
    return Translator(
        pair=TokenizerPair(vocabularies=(known(student), known(teacher))),
        chats={side: ChatFormat(tokenizer=t) for side, t in tokenizers.items()},  # type: ignore[misc]
        limit=limit,
    )


def prompt(made: Translator) -> Example:
    views = {}
    for side, chat in made.chats.items():
        ids = np.array(chat.ids("question: "), np.int32)
        views[side] = TokenSequence(ids_T=ids, supervised_T=np.zeros(len(ids), bool))
    return Example(source="s", views=views)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, end: bool = True) -> np.ndarray:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.array([*ids, tokenizer.eos_token_id] if end else ids, np.int32)


def spelled(made: Translator, example: Example, side: int) -> bytes:
    view = ("student", "teacher")[side]
    return made.pair.vocabularies[side].tokens.spell(example.views[view].target_ids_N)


TEXTS = ("It is 12.", " a leading space", "你好，世界 🙂", "x\n\n  y", "")  # noqa: RUF001


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "pair", [("gpt2", "qwen"), ("gpt2", "sentencepiece"), ("sentencepiece", "gpt2")]
)
def test_the_other_side_reads_the_same_text(pair: tuple[str, str], text: str) -> None:
    made = translator(*pair)
    own = ids_of(real_tokenizer(pair[0]), text)
    example = made.answered(prompt(made), own, "student")
    np.testing.assert_array_equal(example.student.target_ids_N, own)
    assert spelled(made, example, 1).decode() == text
    assert example.teacher.ids_T[-1] == real_tokenizer(pair[1]).eos_token_id
    alignment = example.alignments["teacher"]
    ends = [len(example.views[side].target_ids_N) - 1 for side in ("student", "teacher")]
    assert alignment.pairs_P2[-1].tolist() == ends
    student, teacher = (v.tokens for v in made.pair.vocabularies)
    for a, b, c, d in alignment.spans_S4.tolist():
        ours = student.spell(example.student.target_ids_N[a:b])
        theirs = teacher.spell(example.teacher.target_ids_N[c:d])
        assert ours == theirs or ours == b" " + theirs


def test_the_student_trains_on_the_ids_that_it_sampled() -> None:
    """Also where they are not those that it would cut the text into."""
    made = translator("gpt2", "qwen")
    table = made.pair.vocabularies[0].tokens.id_of
    sampled = np.array([table[letter] for letter in (b"I", b"t", b" ", b"i", b"s")], np.int32)
    example = made.answered(prompt(made), sampled, "student")
    assert example.student.target_ids_N.tolist() == sampled.tolist()
    assert spelled(made, example, 1) == b"It is"
    assert example.alignments["teacher"].pairs_P2.tolist() == [[0, 0], [2, 1]]


def test_text_that_is_no_utf8_goes_up_to_the_first_such_byte() -> None:
    assert valid_text("né".encode()[:-1]) == "n"
    assert valid_text(b"a\xffb") == "a"
    made = translator("gpt2", "qwen")
    table = made.pair.vocabularies[0].tokens.id_of
    broken = np.array([table[b"ok"], table[b"\xff"], table[b"ok"]], np.int32)
    example = made.answered(prompt(made), broken, "student")
    assert spelled(made, example, 1) == b"ok"
    alignment = example.alignments["teacher"]
    assert alignment.pairs_P2.tolist() == [[0, 0]]  # and no end: there is more on one side
    assert alignment.spans_S4.tolist() == []


def test_a_reader_that_rewrites_is_followed_up_to_there() -> None:
    made = translator("gpt2", "qwen")
    own = ids_of(real_tokenizer("gpt2"), "cafe then e\u0301 and more")
    example = made.answered(prompt(made), own, "student")
    student = made.pair.vocabularies[0].tokens
    last = int(example.alignments["teacher"].pairs_P2[-1, 0])
    assert student.spell(example.student.target_ids_N[:last]) == b"cafe then "[:-1]
    assert len(example.student.target_ids_N) == len(own)


def test_a_view_that_gets_too_long_is_cut_and_has_no_end() -> None:
    made = translator("qwen", "gpt2", limit=12)
    own = ids_of(real_tokenizer("qwen"), "你好，世界你好，世界")  # noqa: RUF001 - text of all scripts
    example = made.answered(prompt(made), own, "student")
    assert len(example.teacher.ids_T) == 12
    ends = [len(example.views[side].target_ids_N) - 1 for side in ("student", "teacher")]
    assert ends not in example.alignments["teacher"].pairs_P2.tolist()


def test_the_teachers_answer_in_the_students_tokens() -> None:
    made = translator("gpt2", "qwen")
    own = ids_of(real_tokenizer("qwen"), "It is 12345.")
    example = made.answered(prompt(made), own, "teacher")
    np.testing.assert_array_equal(example.teacher.target_ids_N, own)
    np.testing.assert_array_equal(
        example.student.target_ids_N, ids_of(real_tokenizer("gpt2"), "It is 12345.")
    )


def test_what_became_of_answers_is_counted() -> None:
    made = translator("gpt2", "qwen")
    table = made.pair.vocabularies[0].tokens.id_of
    texts = [
        ids_of(real_tokenizer("gpt2"), "It is 12."),
        ids_of(real_tokenizer("gpt2"), " a leading space", end=False),
        np.array([table[b"I"], table[b"t"]], np.int32),
        np.array([table[b"ok"], table[b"\xff"]], np.int32),
        ids_of(real_tokenizer("gpt2"), "then e\u0301 and more"),
        np.zeros(0, np.int32),
    ]
    examples = [made.answered(prompt(made), ids, "student") for ids in texts]
    counted = made.count(examples, "student")
    assert counted == Translated(
        answers=6,
        not_canonical=1,
        invalid_utf8=1,
        rewritten=1,
        tokens=sum(map(len, texts)),
        paired=sum(len(e.alignments["teacher"].pairs_P2) for e in examples),
    )
    assert 0 < counted.paired < counted.tokens
    assert counted.shortened == pytest.approx(2 / 6)


@pytest.mark.parametrize("pair", [("gpt2", "sentencepiece"), ("sentencepiece", "gpt2")])
def test_a_space_that_a_tokenizer_puts_in_front_is_no_rewriting(pair: tuple[str, str]) -> None:
    made = translator(*pair)
    own = [ids_of(real_tokenizer(pair[0]), text) for text in TEXTS]
    counted = made.count([made.answered(prompt(made), ids, "student") for ids in own], "student")
    assert (counted.answers, counted.invalid_utf8, counted.rewritten) == (len(TEXTS), 0, 0)


def test_an_answer_behind_a_context() -> None:
    sequence = TokenSequence(
        ids_T=np.array([1, 2, 3, 4], np.int32), supervised_T=np.array([False, False, True, True])
    )
    made = with_answer(sequence, [9])
    assert made.ids_T.tolist() == [1, 2, 9]
    assert made.supervised_T.tolist() == [False, False, True]
