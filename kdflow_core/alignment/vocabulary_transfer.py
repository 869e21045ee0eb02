"""A model's weights under another tokenizer.

Tokens that both tokenizers have keep their embedding. The others start from old ones: from the mean
of all, or from the mean of the pieces that the old tokenizer cuts them into. A tied mean of pieces
is a too likely output, so the mean of all is the better start for most (measured: README).

Dimensions: V new ids, W old ids, H hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kdflow_core.alignment.classes import cutter_of
from kdflow_core.alignment.token_bytes import TokenBytes, token_bytes
from kdflow_core.models.families import family_of
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.models.saving import save_model_folder
from kdflow_core.models.tokenizers import load_tokenizer, true_vocabulary_size

Start = Literal["mean_of_all", "mean_of_pieces"]


def transfer_vocabulary(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    start: Start,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[int, int]:
    """Write a copy of a model with the vocabulary of another tokenizer, and that tokenizer; how
    many of its tokens both have, and how many there are.

    Raises ModelError.
    """
    config = load_config(base, trust_remote_code=trust_remote_code)
    model = load_causal_lm(
        base, dtype=torch.float32, attention="eager", trust_remote_code=trust_remote_code
    )
    old = load_tokenizer(base, trust_remote_code=trust_remote_code)
    size = true_vocabulary_size(tokenizer)
    pieces, shared = _pieces(old, tokenizer, size, start)
    rule, state = family_of(config).head, dict(model.state_dict())
    known = true_vocabulary_size(old)
    for name in {rule.embedding, rule.weight, rule.bias} & state.keys():
        state[name] = _means(state[name][:known], pieces)
    text = config.get_text_config()
    text.vocab_size = size
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(text, name, value)
    save_model_folder(
        config=config,
        state_dict=state,
        dtype=dtype,
        generation_config=GenerationConfig(**ids),
        target=target,
    )
    tokenizer.save_pretrained(target)
    return shared, size


def _pieces(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, size: int, start: Start
) -> tuple[list[Sequence[int]], int]:
    """Of each new id, the old ids that it starts from (none: from all); and how many tokens both
    have.
    """
    olds, news = token_bytes(old, "teacher"), token_bytes(new, "student")
    pieces: list[Sequence[int]] = [()] * size
    missing: list[int] = []
    shared = 0
    for number, token in enumerate(news.spelled[:size]):
        if token in olds.id_of:
            pieces[number] = (olds.id_of[token],)
            shared += 1
        elif token:
            missing.append(number)
    if start == "mean_of_pieces":
        for number, ids in zip(missing, _cut(old, olds, news, missing), strict=True):
            pieces[number] = ids
    if old.eos_token_id is not None and new.eos_token_id is not None:
        pieces[new.eos_token_id] = (old.eos_token_id,)  # they say the same: it ends here
    return pieces, shared


def _cut(
    old: PreTrainedTokenizerBase, olds: TokenBytes, news: TokenBytes, missing: Sequence[int]
) -> list[Sequence[int]]:
    """Tokens as the old tokenizer cuts them; parts of characters byte by byte."""
    texts = [news.spelled[i].decode(errors="replace") for i in missing]
    found: list[Sequence[int]] = []
    encoded = cutter_of(old).encode_batch_fast(texts, add_special_tokens=False)
    for number, cut in zip(missing, encoded, strict=True):
        token = news.spelled[number]
        if olds.spell(cut.ids) == token:
            found.append(cut.ids)
        else:
            letters = (olds.id_of.get(bytes([byte])) for byte in token)
            found.append([i for i in letters if i is not None])
    return found


def _means(old_WH: torch.Tensor, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """The mean of some old rows for each new id; [V, H], or [V] of a bias."""
    mean_H = old_WH.mean(0, keepdim=True)
    rows = [old_WH[list(ids)].mean(0, keepdim=True) if ids else mean_H for ids in pieces]
    return torch.cat(rows)
