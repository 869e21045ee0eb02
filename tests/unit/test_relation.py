"""How two tokenizers stand to each other."""

from copy import deepcopy

from kdflow_core.alignment.relation import relation
from tests.real_tokenizers import real_tokenizer


def test_one_vocabulary_in_heads_of_one_size_or_two() -> None:
    gpt2 = real_tokenizer("gpt2")
    assert relation(gpt2, deepcopy(gpt2), (50_257, 50_257))[0] == "exact"
    word, sentence = relation(gpt2, gpt2, (50_257, 50_304))
    assert word == "padded"
    assert "heads of 50,257 and 50,304 rows" in sentence


def test_added_tokens_extend_a_vocabulary_on_either_side() -> None:
    base, extended = real_tokenizer("qwen"), deepcopy(real_tokenizer("qwen"))
    extended.add_tokens(["<think>", "</think>"])
    size = len(base.get_vocab())
    word, sentence = relation(base, extended, (size, size + 2))
    assert word == "extended"
    assert f"{size:,} tokens have one id on both sides; 0 added ones are the student's" in sentence
    assert "2 the teacher's" in sentence
    assert relation(extended, base, (size + 2, size))[0] == "extended"
    other = deepcopy(base)
    other.add_tokens(["<tool>"])
    assert relation(other, extended, (size + 1, size + 2))[0] == "extended"


def test_the_same_tokens_under_other_ids_are_compared_by_their_bytes() -> None:
    base, first, second = (deepcopy(real_tokenizer("gpt2")) for _ in range(3))
    first.add_tokens(["<a>", "<b>"])
    second.add_tokens(["<b>", "<a>"])
    assert relation(first, second, (9, 9))[0] == "bytes"
    assert relation(base, real_tokenizer("qwen"), (9, 9))[0] == "bytes"
