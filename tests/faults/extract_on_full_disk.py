"""Run by test_disk_full inside a mount namespace: the store's disk fills up during extraction."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from configs.load import load_run
from storage.errors import StoreFullError
from tasks.jobs.extraction import extract_states
from tasks.jobs.stage_run import StageRun
from tasks.stages.identity import StageSpec, open_store
from tasks.stages.planning import plan_stages
from tests.conftest import SilentReporter, run_inline


class FillsTheDisk(SilentReporter):
    """Writes until nothing more fits, once the first shard is committed."""

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self._disk = disk

    def progress(
        self,
        *,
        done: int,
        total: int,
        unit: str,
        detail: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        ballast = self._disk / "ballast"
        if not ballast.exists() and list(self._disk.rglob("commits/000001.json")):
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError:
                    pass


def main(recipe: str, disk: Path) -> None:
    run = load_run(recipe, {"storage.root": str(disk / "store")})
    refs = run_inline(run, until="tokenize")
    identity = plan_stages(run)["extract"]
    spec = StageSpec(identity=identity, run=run, inputs=refs)
    result: dict[str, object] = {}
    try:
        extract_states(StageRun(spec, FillsTheDisk(disk)))
    except StoreFullError as error:
        result["error"] = str(error)
    result["committed"] = len(list(disk.rglob("commits/*.json")))
    result["absent"] = open_store(run).why_absent(identity.kind, identity.digest)
    (disk / "ballast").unlink()
    again = SilentReporter()
    ref = extract_states(StageRun(spec, again))
    result["messages"] = again.messages
    result["found"] = open_store(run).find(identity.kind, identity.digest) == ref
    print(json.dumps(result))  # noqa: T201 - the result for the test


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
