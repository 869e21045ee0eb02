"""Estimate a run without Prefect: prepare and tokenize, which any run needs, then probe."""

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from tasks.checks.run_check import checked_plan
from tasks.execution.launch import Logger, launch_stage
from tasks.forecast.estimate import Estimate, Prospect, prospect_here, read_estimate
from tasks.stages.identity import open_store, stage_spec


def estimate(run: RunConfig, logger: Logger) -> tuple[Estimate, Prospect]:
    """What the run will take. Its stages up to the probe are computed, or come from the store.

    Raises ConfigError for an algorithm that reads no teacher states.
    """
    if not run.algorithm.reads_signals:
        raise ConfigError(
            f"algorithm.type={run.algorithm.type} reads no teacher states in training, so there is "
            "no choice between live and replay to estimate; set algorithm.type=vanilla_kd"
        )
    done: dict[str, ArtifactRef] = {}
    for identity in checked_plan(
        run.model_copy(update={"delivery": "auto"}), download=True
    ).values():
        ref = launch_stage(stage_spec(identity, run, done), logger)
        done = done | {identity.output: ref}
    found = read_estimate(open_store(run), done["estimate"])
    return found, prospect_here(run, found)
