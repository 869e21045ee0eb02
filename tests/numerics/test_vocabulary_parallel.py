"""A head spread over ranks by vocabulary gives the loss and gradients of the whole head."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.chunked import LossOutput, distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.token_weights import TeacherConfidence
from kdflow_core.losses.vocabulary import ShardedVocabulary, WholeVocabulary
from tests.processes import run_ranks

RANKS, TOKENS, VOCABULARY, STUDENT, TEACHER = 3, (4, 0, 7), 23, 6, 8
PARTS = (8, 8, 7)
WHOLE_ONLY = {"adaptive_kl", "hierarchical_ranking"}


def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = sum(TOKENS)
    return {
        "hidden": random(total, STUDENT),
        "weight": random(VOCABULARY, STUDENT),
        "bias": random(VOCABULARY),
        "teacher": random(total, TEACHER),
        "teacher_weight": random(VOCABULARY, TEACHER),
        "targets": torch.randint(0, VOCABULARY, (total,), generator=generator),
        "weights": torch.rand(total, generator=generator, dtype=torch.float64),
        "sampled": -torch.rand(total, generator=generator, dtype=torch.float64) * 3,
    }


def loss_of(
    name: str, rows: slice, tokens: slice, vocabulary: Any
) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    """The loss of some rows with a part of the heads, and the gradients."""
    given = problem()
    hidden_TH = given["hidden"][rows].requires_grad_()
    weight_VH = given["weight"][tokens].clone().requires_grad_()
    bias_V = given["bias"][tokens].clone().requires_grad_()
    output = distillation_loss(
        student_hidden_TH=hidden_TH,
        student_head=OutputHead(weight_VH=weight_VH, bias_V=bias_V, softcap=3.0),
        teacher=HiddenSignal(
            given["teacher"][rows], OutputHead(weight_VH=given["teacher_weight"][tokens])
        ),
        target_ids_T=given["targets"][rows],
        weights_T=given["weights"][rows],
        sampled_log_prob_T=given["sampled"][rows],
        spec=LossSpec(
            divergence=LOSSES[name](temperature=1.5),
            kd_ratio=0.6,
            logits_bytes=2 * 3 * VOCABULARY * 8,
            token_weight=TeacherConfidence(),
            vocabulary=vocabulary,
        ),
    )
    output.loss.backward()
    gradients = {"hidden": hidden_TH.grad, "weight": weight_VH.grad, "bias": bias_V.grad}
    return output, {k: v for k, v in gradients.items() if v is not None}


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    first, begin = sum(PARTS[:rank]), sum(TOKENS[:rank])
    tokens, rows = slice(first, first + PARTS[rank]), slice(begin, begin + TOKENS[rank])
    vocabulary = ShardedVocabulary(first=first, whole=VOCABULARY, group=dist.group.WORLD)
    results = {}
    for name in sorted(LOSSES.keys() - WHOLE_ONLY):
        output, gradients = loss_of(name, rows, tokens, vocabulary)
        results[name] = (output.loss.detach(), output.terms, gradients)
    for name in WHOLE_ONLY:
        with pytest.raises(ValueError, match="needs the whole vocabulary on one rank"):
            loss_of(name, rows, tokens, vocabulary)
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_it_is_the_loss_of_the_whole_head(tmp_path: Path) -> None:
    """For every divergence that can, in all terms and gradients; ranks have uneven rows, one none,
    and uneven parts of the vocabulary.
    """
    run_ranks(rank_main, str(tmp_path), ranks=RANKS)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(RANKS)]
    for name in sorted(LOSSES.keys() - WHOLE_ONLY):
        whole, gradients = loss_of(name, slice(None), slice(None), WholeVocabulary())
        torch.testing.assert_close(sum(result[name][0] for result in ranks), whole.loss.detach())
        for term, term_T in whole.terms.items():
            joined_T = torch.cat([result[name][1][term] for result in ranks])
            torch.testing.assert_close(joined_T, term_T, msg=f"{name}, {term}")
        for key, expected in gradients.items():
            joined = torch.cat([result[name][2][key] for result in ranks])
            torch.testing.assert_close(joined, expected, msg=f"{name}, gradient of {key}")
