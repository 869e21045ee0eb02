"""Files of a model that are not what they should be: refused at planning, in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from kdflow_core.errors import ModelError
from tasks.checks.run_check import checked_plan

FIELDS: list[dict[str, Any]] = [
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 10**7},  # building it would not end
    {"num_hidden_layers": "2"},
    {"hidden_size": "32"},
    {"hidden_size": 10**9},
    {"vocab_size": 10**12},
    {"num_attention_heads": 7},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": "many"},
    {"hidden_act": "foo"},
    {"rope_scaling": {"type": "foo"}},
    {"rms_norm_eps": float("nan")},
    {"eos_token_id": "x"},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": []},
    {"model_type": 5},
    {"dtype": "foo"},
    {"tie_word_embeddings": "yes"},
    {"text_config": [1]},
]
CONTENTS = [b"", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}']


def refuse(recipe: Path, folder: Path) -> str:
    run = load_run(str(recipe), {"student.model.path": str(folder)})
    with pytest.raises(ModelError) as caught:
        checked_plan(run, download=False)
    return str(caught.value)


@pytest.fixture
def copy(student_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student_folder, tmp_path / "model"))


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_fields_of_the_config(
    make_recipe: Callable[..., Path], copy: Path, fields: dict[str, Any]
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert str(copy) in refuse(make_recipe(), copy) or "LlamaForCausalLM" in refuse(
        make_recipe(), copy
    )


@pytest.mark.parametrize("content", CONTENTS, ids=lambda c: repr(c[:12]))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_contents(make_recipe: Callable[..., Path], copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", CONTENTS[-1]):
        return  # an object with a field that nobody reads
    assert str(copy) in refuse(make_recipe(), copy)
