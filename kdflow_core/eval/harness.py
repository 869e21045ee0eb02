"""Benchmarks by EleutherAI's LM Evaluation Harness. With `engine_lm`, what knows `lm_eval`."""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.schema.eval import LmEvalConfig
from kdflow_core.errors import DataError
from kdflow_core.sinks import Reporter

SEPARATOR = ","  # between a metric and the filter of what it was taken of, in the harness's results
NO_FILTER = "none"
STDERR = 2


class ReportingModel(HFLM):  # type: ignore[misc]
    """A model at hand, as the harness asks it; every forward pass is progress."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        reporter: Reporter,
        title: str,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._reporter = reporter
        self._title = title
        self._asked = self._total = 0

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> Any:
        self._total += len(requests)
        return super()._loglikelihood_tokens(requests, *args, **options)

    def generate_until(self, requests: list[Any], *args: Any, **options: Any) -> Any:
        """See `HFLM`."""
        self._total += len(requests)
        return super().generate_until(requests, *args, **options)

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> Any:
        self._tell(len(inps))
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> Any:
        self._tell(len(context))
        return super()._model_generate(context, *args, **options)

    def _tell(self, count: int) -> None:
        # Requests that are alike are asked once.
        self._asked = min(self._asked + count, self._total)
        self._reporter.progress(
            done=self._asked, total=self._total, unit="requests", detail=self._title
        )


def task_manager(config: LmEvalConfig) -> TaskManager:
    """The harness's tasks, and one's own. Raises DataError for names that it has not."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=config.tasks_folder)
    for name in config.tasks:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise DataError(
                f"eval.lm_eval.tasks: lm_eval has no task '{name}'; {hint}`lm-eval ls tasks` lists "
                "them"
            )
    return manager


def run_tasks(config: LmEvalConfig, manager: TaskManager, model: LM) -> list[dict[str, Any]]:
    """Ask all tasks: one record for each metric of a task or group, with its standard error where
    the harness has one. Raises DataError where a task's documents cannot be had.
    """
    try:
        with _quiet():
            found = simple_evaluate(
                model=model,
                tasks=list(config.tasks),
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                apply_chat_template=config.chat_template,
                task_manager=manager,
                log_samples=False,
            )
    except (OSError, ValueError) as error:
        raise DataError(f"eval.lm_eval: {type(error).__name__}: {error}") from error
    assert found is not None  # this is its only rank
    return list(_records(found))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness, which draws bars and prints whatever it is told, and the git that
    it asks for its version write. What goes wrong is raised.
    """
    kept = os.dup(STDERR)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nothing,
            redirect_stderr(nothing),
            redirect_stdout(nothing),
        ):
            os.dup2(nothing.fileno(), STDERR)
            yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)


def _records(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    groups = found.get("groups") or {}
    for task, metrics in {**groups, **found["results"]}.items():
        better = found["higher_is_better"].get(task) or {}
        samples = found["n-samples"].get(task)
        for key, value in metrics.items():
            metric, _, taken_of = key.partition(SEPARATOR)
            if not taken_of or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr{SEPARATOR}{taken_of}")
            yield {
                "task": task,
                "metric": metric if taken_of == NO_FILTER else f"{metric} ({taken_of})",
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "higher_is_better": better.get(metric),
                "documents": None if samples is None else samples["effective"],
                "version": found["versions"].get(task),
            }
