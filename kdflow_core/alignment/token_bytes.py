"""The bytes that every id of a tokenizer stands for.

By the ids alone: a token's string, a decoded token and character offsets all lose bytes somewhere
(parts of a character, leading spaces, normalized text). Dimensions: V ids.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kdflow_core.data.chat import SPACE_MARK
from kdflow_core.errors import ModelError

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Normalizers that leave bytes as they are, or change spaces alone, which the bytes of ids undo.
BYTE_NORMALIZERS = frozenset({"Prepend", "Replace"})


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """`spelled[i]` are the bytes of id i: none of a special token, or of an id without a token.

    `special` are the ids that stand for no text, `id_of` the id of each token's bytes: of several
    that spell the same, the one that encoders write. With `composes`, the tokenizer brings text
    into Unicode's form NFC first; with `prefixes`, it puts a space in front of it.
    """

    spelled: tuple[bytes, ...]
    special: frozenset[int]
    id_of: Mapping[bytes, int]
    composes: bool
    prefixes: bool

    @cached_property
    def length_V(self) -> np.ndarray:
        """Bytes of each id, int32."""
        return np.array([len(token) for token in self.spelled], np.int32)

    def spell(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of a run of ids."""
        return b"".join([self.spelled[int(i)] for i in ids])


def token_bytes(tokenizer: PreTrainedTokenizerBase, title: str) -> TokenBytes:
    """The bytes of a tokenizer's ids; `title` names it in errors.

    Raises ModelError for a tokenizer whose ids do not tell them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(title, f"{type(tokenizer).__name__} has no `tokenizer.json` behind it")
    form: dict[str, Any] = json.loads(backend.to_str())
    normalizers = {part["type"] for part in _parts(form.get("normalizer"))}
    changing = normalizers - BYTE_NORMALIZERS - {"NFC"}
    if changing:
        raise _refused(title, f"it rewrites text before it cuts it ({', '.join(sorted(changing))})")
    spell = _speller(form, title)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    spelled = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        spelled[number] = spell(token)
    special = set()
    for added in form["added_tokens"]:
        number, content = added["id"], added["content"]
        spelled[number] = b"" if added["special"] else spell.added(content)
        if added["special"]:
            special.add(number)
    id_of: dict[bytes, int] = {}
    # Byte tokens (`<0x41>`) repeat others (`A`), and encoders write those.
    for number in sorted(vocabulary.values(), key=lambda i: (_is_byte(backend.id_to_token(i)), i)):
        if spelled[number]:
            id_of.setdefault(spelled[number], number)
    return TokenBytes(
        spelled=tuple(spelled),
        special=frozenset(special),
        id_of=id_of,
        composes="NFC" in normalizers,
        prefixes="Prepend" in normalizers or any(map(_puts_space, _parts(form["pre_tokenizer"]))),
    )


def _speller(form: Mapping[str, Any], title: str) -> "_ByteLevel | _SentencePiece":
    """What gives a token's bytes, by the kind of the tokenizer."""
    parts = [*_parts(form.get("pre_tokenizer")), *_parts(form.get("decoder"))]
    kinds = {part["type"] for part in parts}
    if form["model"]["type"] == "WordPiece" or "WordPiece" in kinds:
        raise _refused(title, "WordPiece loses white space and letter case")
    if "ByteLevel" in kinds:
        return _ByteLevel()
    replaced = any(_replaces_mark(part) for part in [*parts, *_parts(form.get("normalizer"))])
    if "Metaspace" in kinds or replaced:
        return _SentencePiece()
    raise _refused(
        title,
        f"{form['model']['type']} with the decoder {sorted(kinds) or 'none'} is no kind that is "
        "known here",
    )


class _ByteLevel:
    """GPT-2's alphabet: a printable letter for each byte."""

    def __init__(self) -> None:
        self._byte = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def __call__(self, token: str) -> bytes:
        try:
            return bytes(self._byte[letter] for letter in token)
        except KeyError:
            return self.added(token)

    def added(self, content: str) -> bytes:
        """An added token that stands for text is written as it is."""
        return content.encode()


class _SentencePiece:
    """Text with a mark for spaces, and tokens for the bytes that no piece has."""

    def __call__(self, token: str) -> bytes:
        if _is_byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE_MARK, " ").encode()

    def added(self, content: str) -> bytes:
        """An added token that stands for text is spelled as others are."""
        return self(content)


def _is_byte(token: str) -> bool:
    """Whether a token of SentencePiece stands for a byte."""
    return BYTE_TOKEN.fullmatch(token) is not None


def _parts(node: Any) -> Iterator[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or what it is a sequence of."""
    if not node:
        return
    inner = next(
        (node[key] for key in ("normalizers", "pretokenizers", "decoders") if key in node), None
    )
    if inner is None:
        yield node
    for part in inner or ():
        yield from _parts(part)


def _puts_space(part: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer puts a space in front of a text."""
    return bool(part.get("add_prefix_space")) or part.get("prepend_scheme") in ("first", "always")


def _replaces_mark(part: Mapping[str, Any]) -> bool:
    """Whether a part of a tokenizer turns spaces into marks, or marks into spaces."""
    pattern = part.get("pattern") or {}
    return SPACE_MARK in (pattern.get("String"), part.get("content"))


def _refused(title: str, reason: str) -> ModelError:
    return ModelError(
        f"the {title}'s tokenizer cannot be aligned by bytes: {reason}. Choose a {title} with a "
        "byte-level BPE or SentencePiece tokenizer"
    )
