"""Model folders and what they say about themselves, without loading a model library."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from kdflow_core.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
WEIGHT_FILES = ["*.safetensors"]


def resolve_folder(path: str, revision: str | None, *, weights: bool = True) -> Path:
    """The local folder of a model given as folder or hub name (downloaded when needed).

    Without `weights` only the small files are fetched. Raises ModelError when there is none.
    """
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/")):
        raise ModelError(f"there is no model folder '{path}'")
    patterns = SMALL_FILES + (WEIGHT_FILES if weights else [])
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model '{path}' (revision {revision or 'main'}) is neither a local folder nor to be "
            f"had from the hub: {error}"
        ) from error


def context_length(folder: Path) -> int:
    """The longest sequence that the model was made for, in tokens. Raises ModelError."""
    return int(text_config(folder).get("max_position_embeddings") or 2**31)


def text_config(folder: Path) -> dict[str, Any]:
    """The config of a model's language part, as its file has it. Raises ModelError."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder} has no readable config.json: {error}") from error
    part: dict[str, Any] = config.get("text_config", config)
    return part
