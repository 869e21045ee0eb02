"""The host of a rank that checks the models of a run: it has loaded what that needs."""

from pathlib import Path

from configs.schema.run import RunConfig
from kdflow_core.workers.base import RankContext, offered
from tasks.checks.model_check import check_folders


class ModelChecking:
    """A rank that looks at models; `spec` is the run in JSON."""

    def __init__(self, context: RankContext, spec: str) -> None:
        del context  # it is alone
        self._run = RunConfig.model_validate_json(spec)

    @offered
    def check(self, folders: dict[str, str]) -> None:
        """See `check_folders`."""
        check_folders(self._run, {name: Path(folder) for name, folder in folders.items()})

    def close(self) -> None:
        """Nothing is left to be done."""
