"""Samples that earlier runs have tokenized alike: a night with more data tokenizes what is new."""

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kdflow_core.contracts import Example
from storage.artifact import Manifest
from storage.store import ArtifactStore
from storage.token_keys import TokenKeys, keys_path
from storage.tokens import TokenTable
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import TokenExamples
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.identity import StageIdentity
from tasks.stages.slices import SPLITS

TOKENIZE = CATALOGUE["tokenize"]
MOST, MOST_READ = 64, 4  # artifacts that are looked at, and that are read, the newest first


class EarlierTokens:
    """Tables of examples, found by the keys of their samples."""

    def __init__(self, tables: Sequence[tuple[TokenKeys, TokenExamples]]) -> None:
        self._tables = tables

    def __call__(self, key: bytes) -> Example | None:
        """The example of a sample; None where no table has it."""
        for keys, examples in self._tables:
            row = keys.row(key)
            if row is not None:
                return examples[row]
        return None


def earlier_tokens(stage: StageRun) -> EarlierTokens:
    """What the store has of the stage's tokenizers and templates, of other data."""
    manifests = stage.store.newest_manifests(TOKENIZE.kind, MOST)
    serving = (manifest for manifest in manifests if _serves(manifest, stage.spec.identity))
    found = (tables for manifest in serving if (tables := _tables(stage.store, manifest)))
    return EarlierTokens(list(chain.from_iterable(islice(found, MOST_READ))))


def _tables(store: ArtifactStore, manifest: Manifest) -> list[tuple[TokenKeys, TokenExamples]]:
    names = {record.path for record in manifest.files}
    ref = store.find(manifest.kind, manifest.digest)
    files = [Path(f"{split}.arrow") for split in SPLITS]
    if ref is None or not names.issuperset(keys_path(file).name for file in files):
        return []
    paths = [store.local_copy(ref) / file for file in files]
    return [(TokenKeys(keys_path(path)), TokenExamples(TokenTable(path))) for path in paths]


def _serves(manifest: Manifest, own: StageIdentity) -> bool:
    """Whether another artifact has of every sample exactly what this stage makes of it."""
    return (
        manifest.digest != own.digest
        and manifest.code_version == TOKENIZE.code_version
        and reading(manifest.config, manifest.inputs) == reading(own.config, own.inputs)
    )


def reading(config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Of what identifies tokens, all but which samples there are, and how they are split."""
    return {
        "config": {name: own for name, own in config.items() if name not in {"data", "seed"}},
        "supervise": config["data"]["supervise"],
        "inputs": {name: own for name, own in inputs.items() if not name.startswith("data ")},
    }
