"""What is measured of the student, while it trains and at the end."""

from typing import Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, PathText, PythonFunction, StrictModel


class LmEvalConfig(StrictModel):
    """Benchmarks by EleutherAI's LM Evaluation Harness: of the student by transformers, of a
    teacher that SGLang serves by SGLang.
    """

    tasks: tuple[str, ...] = Field(min_length=1, strict=False)
    """Names of its tasks, groups of tasks or tags; `lm-eval ls tasks` lists them."""
    limit: int | None = Field(default=None, gt=0, le=MOST)
    """How many documents of each task are asked, at most; by default all."""
    num_fewshot: int | None = Field(default=None, ge=0, le=MOST)
    """How many examples stand before each question; by default what the task says."""
    chat_template: bool = False
    """Ask by the models' chat templates."""
    batch_size: int = Field(default=8, gt=0, le=MOST)
    """Requests of one forward pass of transformers; lower it when memory runs out."""
    tasks_folder: PathText | None = None
    """A folder with tasks of your own (YAML files), beside the harness's."""


class EvalConfig(StrictModel):
    """Held-out evaluation."""

    every_steps: int | None = Field(default=None, gt=0, le=MOST)
    """Measure the held-out loss every so many optimizer steps of off-policy training, before it and
    at its end; the report shows the curve.
    """
    curve_sequences: int = Field(default=64, gt=0, le=MOST)
    """How many held-out samples that curve is measured on, at most."""
    keep_best: Literal["reverse_kl", "forward_kl", "cross_entropy"] | None = None
    """The result is the student where this figure of the held-out curve (on-policy: of the rounds)
    is least, in place of the last.
    """
    patience: int | None = Field(default=None, gt=0, le=MOST)
    """Training ends when so many points of the curve in a row are no better than the best one."""
    tokens_per_batch: int = Field(default=8192, gt=0, le=MOST)
    """The padded area of one forward pass of the final evaluation, in tokens."""
    max_generations: int = Field(default=32, ge=0, le=MOST)
    """How many held-out prompts teacher and student answer greedily; 0 turns it off."""
    max_new_tokens: int = Field(default=128, gt=0, le=MOST)
    """The longest of those answers, in tokens."""
    verifier: PythonFunction | None = None
    """A Python function of prompt, answer and label, `my_checks.py:right`, to true, false or a
    number from 0 to 1, that says which of those answers are right; by default those that end with
    the data's `answer`.
    """
    lm_eval: LmEvalConfig | None = None
    """Benchmarks by the LM Evaluation Harness, of the teacher before training and of the student
    after it: `{tasks: [arc_easy, gsm8k], limit: 200}`; needs the package `lm_eval`.
    """

    @model_validator(mode="after")
    def _the_best_is_of_a_curve(self) -> "EvalConfig":
        if self.patience is not None and self.keep_best is None:
            raise ValueError(
                f"patience={self.patience} waits for a better figure; say of which with keep_best"
            )
        return self
