"""A model under another tokenizer."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdflow_core.alignment.token_bytes import token_bytes
from kdflow_core.alignment.vocabulary_transfer import transfer_vocabulary
from kdflow_core.models.inspection import Use, check_model
from tests.conftest import make_llama, make_tokenizer


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and another tokenizer."""
    texts = list(topics.values())
    model, other = tmp_path / "model", tmp_path / "other"
    make_tokenizer(model, texts=texts)
    make_tokenizer(other, texts=[text[::-1] for text in texts[:40]])
    return model, other


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("start", ["mean_of_all", "mean_of_pieces"])
def test_shared_tokens_keep_their_rows_and_others_start_from_means(
    folders: tuple[Path, Path], tmp_path: Path, start: str, tied: bool
) -> None:
    base = folders[0]
    make_llama(base, hidden=16, layers=1, rows=448, seed=0, tied=tied)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    target = tmp_path / "target"
    shared, size = transfer_vocabulary(
        base,
        tokenizers[1],
        target,
        start=start,  # type: ignore[arg-type]
        dtype=torch.float32,
    )
    old, new = (AutoModelForCausalLM.from_pretrained(f) for f in (base, target))
    known = max(tokenizers[0].get_vocab().values()) + 1
    tokens = [token_bytes(tokenizer, "student") for tokenizer in tokenizers]
    assert new.config.vocab_size == size == len(tokens[1].spelled)
    assert new.config.eos_token_id == tokenizers[1].eos_token_id
    assert shared == len(tokens[0].id_of.keys() & tokens[1].id_of.keys())
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(m, part)().weight.detach() for m in (old, new))
        for number, token in enumerate(tokens[1].spelled):
            if token in tokens[0].id_of:
                expected = before[tokens[0].id_of[token]]
            elif number == tokenizers[1].eos_token_id:
                expected = before[tokenizers[0].eos_token_id]
            elif token and start == "mean_of_pieces":
                cut = tokenizers[0](token.decode(errors="ignore"), add_special_tokens=False)
                if tokens[0].spell(cut["input_ids"]) != token:
                    continue  # a part of a character: its bytes
                expected = before[cut["input_ids"]].mean(0)
            else:
                expected = before[:known].mean(0)
            torch.testing.assert_close(after[number], expected)
    check_model(target, Use(attentions=("sdpa",), trained=True))
    text = "def f(x): return x + 1"
    again = AutoTokenizer.from_pretrained(target)
    assert again(text)["input_ids"] == tokenizers[1](text)["input_ids"]
