"""Small records of the store: a JSON file each, which other versions may have written."""

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from storage.store import ArtifactStore

Record = TypeVar("Record", bound=BaseModel)


def read_records(store: ArtifactStore, folder: str, kind: type[Record]) -> list[Record]:
    """All records of a folder of the store that can be read as such."""
    root = f"{store.root}/{folder}"
    paths = [f"{root}/{name}" for name in store.list_names(root) if name.endswith(".json")]
    found = []
    for content in store.read_many(paths).values():
        try:
            found.append(kind.model_validate(json.loads(content)))
        except (ValidationError, ValueError):
            continue  # of another version, or damaged: it refers to nothing that can be named
    return found
