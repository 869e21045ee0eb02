"""Model folders and what they say about themselves, without loading a model library."""

import json
from pathlib import Path
from typing import Any

from configs.patience import is_transient, patient
from kdflow_core.errors import ModelError
from kdflow_core.models.families.base import LAYER_FIELDS, context_field

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "tekken.json",
)
HUB_ATTEMPTS = 3
MOST_LAYERS = 4096
TEMPLATE_FOLDER = "additional_chat_templates"
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken"]
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
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - takes a while to load

    try:
        fetch = patient(f"model {path}", attempts=HUB_ATTEMPTS, transient=_hub_is_away)
        return Path(fetch(snapshot_download, path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model '{path}' (revision {revision or 'main'}) is neither a local folder nor to be "
            f"had from the hub: {error}"
        ) from error


def _hub_is_away(error: BaseException) -> bool:
    """The hub's client says that nothing is here, and why it could not ask is the cause."""
    cause = error.__cause__
    return is_transient(error) or (cause is not None and is_transient(cause))


def context_length(folder: Path) -> int:
    """The longest sequence that the model was made for, in tokens. Raises ModelError."""
    config = text_config(folder)
    name = context_field(config)
    if name is None:
        return 2**31
    given = config[name]
    if not isinstance(given, int | float) or given < 1:
        raise ModelError(f"{folder}/config.json: {name}={given!r} is no length; mend the file")
    return int(given)


def declared_end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a turn, by the generation config, else by the config; maybe none.

    Raises ModelError.
    """
    generation = folder / "generation_config.json"
    sources = [_json(generation)] if generation.is_file() else []
    for source in (*sources, text_config(folder), _json(folder / "config.json")):
        given = source.get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        found = sorted({int(i) for i in ids if isinstance(i, int) and i >= 0})
        if found:
            return tuple(found)
    return ()


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the files that make up a folder's tokenizer. Raises ModelError for none."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise ModelError(f"{folder} holds no tokenizer")
    templates = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return present + [f"{TEMPLATE_FOLDER}/{path.name}" for path in templates]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent} has no readable {path.name}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent}: {path.name} is no JSON object")
    return value


def _constant(name: str) -> float:
    """Configs may hold an infinity, but nothing is computed with a NaN."""
    if name == "NaN":
        raise ValueError("it holds a NaN")
    return float(name)


def text_config(folder: Path) -> dict[str, Any]:
    """The config of a model's language part, as its file has it. Raises ModelError."""
    config = _json(folder / "config.json")
    part = config.get("text_config", config)
    if not isinstance(part, dict):
        raise ModelError(f"{folder}/config.json: text_config is no JSON object")
    for name in LAYER_FIELDS:
        layers = part.get(name)
        if layers is not None and not (isinstance(layers, int) and 0 < layers <= MOST_LAYERS):
            raise ModelError(
                f"{folder}/config.json: {name}={layers!r} is no number of layers (1 to "
                f"{MOST_LAYERS}); mend the file"
            )
    return part
