"""States that one teacher has left in the store under other tokens."""

from storage.artifact import Manifest
from storage.codecs import codec_named
from storage.store import ArtifactStore
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.identity import StageIdentity

EXTRACT = CATALOGUE["extract"]
MOST = 64  # artifacts that are looked at, the newest first


def states_of_same_teacher(
    store: ArtifactStore, asking: StageIdentity, codec: str | None = None
) -> list[Manifest]:
    """Of artifacts of states that hold, of other sequences, what the teacher would say that a stage
    asks, the newest first: exactly, or in a codec. Whether its head is the same is not looked at.
    """
    return [
        manifest
        for manifest in store.newest_manifests(EXTRACT.kind, MOST)
        if manifest.digest != asking.digest
        and manifest.code_version == EXTRACT.code_version
        and manifest.inputs["teacher_model"] == asking.inputs["teacher_model"]
        and manifest.config["teacher"] == asking.config["teacher"]
        and _is_fit(manifest.info["layout"]["codec"], codec)
    ]


def _is_fit(codec: str, wanted: str | None) -> bool:
    return codec_named(codec).lossless if wanted is None else codec == wanted
