"""The reference that crosses task boundaries, and the manifest that makes an artifact exist."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.digest import digest

SCHEMA_VERSION = 2


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

    @property
    def name(self) -> str:
        """How records and commands call it: `kind/digest`."""
        return f"{self.kind}/{self.digest}"


class FileRecord(BaseModel):
    """One file of an artifact: its path inside the folder, its size in bytes, its XXH3-128."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    num_bytes: int
    xxh3: str


class Manifest(BaseModel):
    """Everything a consumer must know about an artifact; written last, with a checksum of its own.

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

    def to_bytes(self) -> bytes:
        """As JSON, with the digest of the rest as `checksum`."""
        fields = self.model_dump(mode="json")
        return json.dumps({"checksum": digest(fields)} | fields, indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """Raises ValueError for what is not a manifest, or not as it was written."""
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version}, this kdflow writes {SCHEMA_VERSION}")
        if fields.pop("checksum", None) != digest(fields):
            raise ValueError("it does not have its checksum")
        return cls.model_validate_json(json.dumps(fields))
