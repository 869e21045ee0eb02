"""Held-out scores against full logits in float64, for the student and for the teacher itself."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import load_run
from kdflow_core.contracts import TeacherAtHand
from kdflow_core.eval.distribution import ModelAtHand, StatesAtHand, score_distributions
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_causal_lm, load_config
from storage.states.reader import HiddenStateReader
from storage.tokens import TokenTable
from tasks.jobs.stored import StoredStates, TokenExamples
from tasks.stages.identity import open_store
from tests.conftest import VOCABULARY, SilentReporter, run_inline

# Far more than a model has, so that random ones are right now and then.
END_IDS = range(0, VOCABULARY, 2)


@pytest.mark.parametrize("judged", ["student", "teacher", "teacher's states"])
def test_scores_are_those_of_full_logits(
    make_recipe: Callable[..., Path], teacher_folder: Path, student_folder: Path, judged: str
) -> None:
    side = judged.partition("'")[0]
    run = load_run(str(make_recipe()))
    refs = run_inline(run, until="extract")
    examples = TokenExamples(TokenTable(Path(refs["tokens"].uri) / "heldout.arrow"))
    folder = {"student": student_folder, "teacher": teacher_folder}[side]
    teacher = TeacherAtHand(
        signals=StoredStates(HiddenStateReader(store=open_store(run), ref=refs["states"])),
        head=load_head(teacher_folder, load_config(teacher_folder), VOCABULARY),
    )
    scores = score_distributions(
        judged=StatesAtHand(teacher)
        if judged == "teacher's states"
        else ModelAtHand(load_causal_lm(folder, dtype=torch.float32, attention="sdpa"), VOCABULARY),
        examples=examples,
        teachers={"all": teacher},
        tokens_per_batch=100,
        reporter=SilentReporter(),
        title=side,
        side=side,  # type: ignore[arg-type]
        end_ids=END_IDS,
        aligned={},
    ).scores(aligned=False)["all"]

    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for name, path in (("teacher", teacher_folder), ("scored", folder))
    }
    sums = torch.zeros(7, dtype=torch.float64)
    for index in range(len(examples)):
        sequence = examples[index].student
        ids_BT = torch.tensor(sequence.ids_T).long()[None]
        rows_N = torch.tensor(sequence.target_positions_N - 1)
        with torch.no_grad():
            p_NV, q_NV = (
                torch.softmax(models[n](ids_BT).logits[0, rows_N, :VOCABULARY], -1)
                for n in ("teacher", "scored")
            )
        gold_N = ids_BT[0, rows_N + 1]
        is_end_N = gold_N % 2 == 0
        sums += torch.stack(
            [
                (p_NV * (p_NV / q_NV).log()).sum(),
                (q_NV * (q_NV / p_NV).log()).sum(),
                (p_NV.argmax(-1) == q_NV.argmax(-1)).sum(),
                -q_NV[torch.arange(len(rows_N)), gold_N].log().sum(),
                torch.tensor(len(rows_N)),
                is_end_N.sum(),
                (q_NV.argmax(-1)[is_end_N] % 2 == 0).sum(),
            ]
        )
    forward, reverse, agreement, cross_entropy, count, ends, right = sums.tolist()
    assert scores.num_tokens == count
    # The stored states are rounded to bfloat16: 2^-9 relative, on logits of a few nats.
    assert scores.forward_kl == pytest.approx(forward / count, rel=5e-3, abs=1e-4)
    assert scores.reverse_kl == pytest.approx(reverse / count, rel=5e-3, abs=1e-4)
    assert scores.agreement == pytest.approx(agreement / count, abs=0.02)
    assert (scores.num_ends, scores.end_accuracy) == (ends, right / ends)
    assert 0 < right < ends
    assert scores.shared_mass is None
    exact = 5e-3 if judged == "teacher's states" else 1e-4
    assert scores.perplexity == pytest.approx(math.exp(cross_entropy / count), rel=exact)
