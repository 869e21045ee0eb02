"""Rows that the library `datasets` reads: folders of `save_to_disk`, and data sets of the hub."""

from collections.abc import Iterator
from typing import Any

import datasets

from configs.schema.data import HubSource, SavedSource
from kdflow_core.errors import DataError


def dataset_rows(source: SavedSource | HubSource) -> Iterator[dict[str, Any]]:
    """The rows, in order. Raises DataError, ValueError or OSError for what cannot be read."""
    try:
        yield from _saved(source) if isinstance(source, SavedSource) else _hub(source)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error)) from error


def _saved(source: SavedSource) -> Iterator[dict[str, Any]]:
    loaded = datasets.load_from_disk(source.path)
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            f"{source.path} holds several splits ({', '.join(loaded)}); "
            f"name one: {source.path}/{next(iter(loaded))}"
        )
    yield from loaded


def _hub(source: HubSource) -> Iterator[dict[str, Any]]:
    yield from datasets.load_dataset(
        source.path,
        source.subset,
        split=source.split,
        revision=source.revision,
        streaming=True,
    )
