"""SGLang's scheduler with a second rank whose bucket of new weights is damaged on its way."""

from functools import partial
from typing import Any

from kdflow_core.sglang_runtime import scheduler


def scheduler_for(vocabulary_size: int) -> "partial[None]":
    """See `kdflow_core.sglang_runtime.scheduler`."""
    return partial(_run, vocabulary_size)


def _run(vocabulary_size: int, *args: Any, **kwargs: Any) -> None:
    load = scheduler._load_bucket

    def damaged(self: Any, bucket: dict[str, Any]) -> None:
        if self.tp_group.rank_in_group == 1:
            bucket = bucket | {"path": "/nowhere/bucket"}
        load(self, bucket)

    scheduler._load_bucket = damaged
    scheduler._run(vocabulary_size, *args, **kwargs)
