"""Which student of a run's name counts as the latest good one: a small record that moves whole."""

import json
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.digest import digest
from storage.errors import StoreCorruptError
from storage.records import read_records
from storage.store import ArtifactStore

FOLDER = "promoted"


class Promoted(BaseModel):
    """The promoted student of the runs of a name: the run that made it, its artifact and its
    evaluation as `kind/digest`, and the student that it began with (None: the recipe's). `before`
    are the runs whose students were promoted earlier, the newest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    run: str
    student: str
    evaluation: str
    started_from: str | None
    promoted_at: str
    before: tuple[str, ...] = ()


def promoted(store: ArtifactStore, name: str) -> Promoted | None:
    """The promoted student of the runs of a name. Raises StoreCorruptError."""
    path = promoted_path(store, name)
    content = store.read_many([path]).get(path)
    if content is None:
        return None
    try:
        return Promoted.model_validate(json.loads(content))
    except (ValidationError, ValueError) as error:
        raise StoreCorruptError(
            f"{path} is no record of a promoted student ({error}); remove it, and the next run of "
            "this name begins with the student of its recipe"
        ) from error


def all_promoted(store: ArtifactStore) -> list[Promoted]:
    """Those of all names; damaged records are left out."""
    return read_records(store, FOLDER, Promoted)


def promote(
    store: ArtifactStore,
    name: str,
    *,
    run: str,
    student: str,
    evaluation: str,
    started_from: str | None,
) -> None:
    """Have a student be the one that counts. Raises StoreError."""
    earlier = promoted(store, name)
    record = Promoted(
        name=name,
        run=run,
        student=student,
        evaluation=evaluation,
        started_from=started_from,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        before=() if earlier is None else (earlier.run, *earlier.before),
    )
    store.write_whole(promoted_path(store, name), record.model_dump_json(indent=1).encode())


def promoted_path(store: ArtifactStore, name: str) -> str:
    """Where the record of a name is."""
    return f"{store.root}/{FOLDER}/{name}-{digest(name)[:8]}.json"
