"""The looped subflow of an on-policy run: rollout -> score -> train."""

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from configs.printable import fenced
from flows.run_events import round_finished
from tasks.presentation.results import artifact_key
from tasks.presentation.rollout_answers import Answer, read_answers
from tasks.rounds.round_record import RoundRecord
from tasks.rounds.round_tasks import run_round
from tasks.rounds.rounds_at_work import RoundsAtWork, rounds_at_work
from tasks.stages.identity import StageSpec, open_store

SHOWN_ANSWERS = 3


def train_on_policy(spec: StageSpec) -> None:
    """All rounds and the trained student's artifact, unless that is there."""
    rounds = RoundsAtWork(spec, get_run_logger())
    if rounds.is_finished():
        return
    with rounds:
        if rounds.is_finished():  # by whom we have waited for
            return
        for line in rounds.memory_forecast():
            get_run_logger().info(line)
        for number in range(rounds.first, rounds.config.rounds + 1):
            on_policy_round(
                number=number, rounds=rounds.config.rounds, student=spec.identity.digest
            )
        rounds.export()


@flow(name="on_policy_round", flow_run_name="round-{number}-of-{rounds}", validate_parameters=False)
def on_policy_round(number: int, rounds: int, student: str) -> dict[str, Any]:
    """One round of those that make a student, by its digest; its record, which also stands in the
    UI.
    """
    rollouts, made = run_round(student, number)
    at_work = rounds_at_work(student)
    run, record = at_work.spec.run, at_work.record(made)
    answers = read_answers(open_store(run).local_copy(rollouts))[:SHOWN_ANSWERS]
    create_markdown_artifact(
        key=f"{artifact_key(run.name)}-round",
        markdown=round_markdown(record, answers),
        description=f"Round {number} of {rounds}",
    )
    get_run_logger().info(round_line(record, rounds))
    round_finished(run, record)
    return record.model_dump(mode="json")


def round_line(record: RoundRecord, rounds: int) -> str:
    """A round for the log."""
    parts = [f"round {record.number} of {rounds}", f"kd {record.kd:.4f}"]
    if record.heldout is not None:
        parts.append(f"held-out reverse KL {record.heldout['reverse_kl']:.4f}")
    if record.reward_mean is not None:
        parts.append(f"reward {record.reward_mean:.3f}")
    parts.append(f"{record.answers} answers of {record.mean_length:.1f} tokens")
    if record.log_prob_difference is not None:
        parts.append(f"engine's log-probs differ by {record.log_prob_difference['mean']:.1e}")
    times = ", ".join(f"{name} {value:.1f}" for name, value in record.seconds.items())
    return " | ".join([*parts, f"seconds: {times}"])


def round_markdown(record: RoundRecord, answers: list[Answer]) -> str:
    """A round for the UI: figures, times and some answers."""
    figures: dict[str, Any] = {
        "answers": record.answers,
        "tokens per answer": f"{record.mean_length:.1f} (longest {record.longest})",
        "ended by": ", ".join(f"{k} {v}" for k, v in record.finish_reasons.items()),
        "student's share of the prompts": f"{record.fraction:.0%}",
        "weights of round": f"{record.version} (staleness {record.staleness})",
        "divergence trained (nats/token)": f"{record.kd:.4f}",
    }
    if record.reward_mean is not None:
        figures["mean reward"] = f"{record.reward_mean:.4f}"
    for name, value in (record.heldout or {}).items():
        figures[f"held-out {name.replace('_', ' ')}"] = f"{value:.4f}"
    for name, value in (record.log_prob_difference or {}).items():
        figures[f"log-prob difference to the engine, {name.replace('_', ' ')}"] = f"{value:.2e}"
    for name, value in (record.translated or {}).items():
        figures[f"across tokenizers: {name.replace('_', ' ')}"] = f"{value:,}"
    for name, value in record.seconds.items():
        figures[f"{name} (s)"] = f"{value:.2f}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    shown = "\n\n".join(fenced(answer.prompt + answer.answer) for answer in answers)
    return f"| | |\n|---|---|\n{rows}\n\n{shown}\n"
