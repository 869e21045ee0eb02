"""The reference that crosses task boundaries, and the manifest that makes an artifact exist."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class ArtifactRef(BaseModel):
    """A finished artifact: small, frozen, JSON. Never a tensor.

    `uri` is the artifact's folder, `num_bytes` the size of its files, `counts` what is in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    digest: str
    uri: str
    num_bytes: int
    counts: dict[str, int] = Field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


class FileRecord(BaseModel):
    """One file of an artifact: its path inside the folder and its size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    num_bytes: int


class Manifest(BaseModel):
    """Everything a consumer must know about an artifact; written last.

    `config` and `inputs` are what the digest was made of; `info` is for consumers and readers
    (JSON); `seconds` is how long the stage ran; `versions` are those of the producing packages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    digest: str
    schema_version: int = SCHEMA_VERSION
    code_version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    files: tuple[FileRecord, ...]
    counts: dict[str, int]
    info: dict[str, Any]
    seconds: float
    created_at: str
    versions: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """The size of all files, in bytes."""
        return sum(record.num_bytes for record in self.files)
