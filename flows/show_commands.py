"""The commands `kdflow show ...`."""

from typing import Annotated

import typer

from configs.load import parse_overrides
from configs.printable import printable
from flows.json_output import AsJson, print_lines
from tasks.checks.run_check import checked_run

app = typer.Typer(help="Look at what a run has made.", no_args_is_help=True)


@app.callback()
def show_options() -> None:
    """Look at what a run has made."""


@app.command()
def rollouts(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="The run's dotted overrides.")
    ] = None,
    number: Annotated[int, typer.Option("--round", min=1, help="Which round.")] = 1,
    limit: Annotated[int, typer.Option(min=1, help="How many answers to print.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Print what the student answered in a round: prompt, answer, and what is known of it."""
    from tasks.presentation.rollout_answers import answers_of  # noqa: PLC0415 - loads pyarrow

    answers = answers_of(checked_run(recipe, parse_overrides(overrides or [])), number)
    if as_json:
        print_lines(answer.model_dump(mode="json") for answer in answers[:limit])
        return
    for answer in answers[:limit]:
        known = [
            answer.source,
            f"{answer.tokens} tokens",
            f"ended by {answer.finish_reason}",
            f"weights of round {answer.version}",
            f"{answer.log_prob:.3f} nats/token",
        ]
        if answer.reward is not None:
            known.append(f"reward {answer.reward:g}")
        if answer.label is not None:
            known.append(f"label {answer.label!r}")
        typer.echo(printable(f"--- {', '.join(known)}\n{answer.prompt}{answer.answer}"))
    typer.echo(f"--- {min(limit, len(answers))} of {len(answers)} answers of round {number}")


@app.command()
def alignment(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="The run's dotted overrides.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many samples to print.")] = 3,
) -> None:
    """Print held-out samples as two rows of tokens, student's and teacher's, cut where both cut."""
    from tasks.presentation.alignment_view import (  # noqa: PLC0415 - loads transformers
        aligned_samples,
        two_rows,
    )

    run = checked_run(recipe, parse_overrides(overrides or []))
    for sample in aligned_samples(run, "heldout", limit):
        typer.echo(
            printable(
                f"--- {sample.source}, {sample.pairs} of {sample.tokens} tokens begin together"
            )
        )
        for line in two_rows(sample.spans):
            typer.echo(printable(line))
