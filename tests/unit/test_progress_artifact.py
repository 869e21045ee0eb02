"""The bar of a long stage in Prefect's UI, of a server that does not answer; of one that does:
`test_deployment`.
"""

import httpx
import pytest

from tasks.execution.progress_artifact import LONG_S, ProgressArtifact


def test_a_server_that_does_not_answer_costs_the_bar_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def create(*arguments: object) -> None:
        asked.append(arguments)
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr("tasks.execution.progress_artifact.create_progress_artifact", create)
    bar = ProgressArtifact("own-train", "Stage train")
    bar.show(2, 8, LONG_S)
    bar.show(3, 8, 2 * LONG_S)
    assert len(asked) == 1
