"""How far a long stage is, as a progress bar in Prefect's UI."""

from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

LONG_S = 10.0


class ProgressArtifact:
    """A bar that appears once a stage has run for `LONG_S` seconds. A server that does not answer
    costs the bar, not the stage.
    """

    def __init__(self, key: str, description: str) -> None:
        self._key = key
        self._description = description
        self._id: UUID | None = None
        self._given_up = False

    def show(self, done: int, total: int, seconds: float) -> None:
        """So much of it is done, after so many seconds."""
        if self._given_up or not total or (self._id is None and seconds < LONG_S):
            return
        percent = 100 * min(1.0, done / total)
        try:
            if self._id is None:
                made = create_progress_artifact(percent, self._key, self._description)
                assert isinstance(made, UUID)  # no coroutine: no event loop runs here
                self._id = made
            else:
                update_progress_artifact(self._id, percent)
        except httpx.HTTPError:
            self._given_up = True
