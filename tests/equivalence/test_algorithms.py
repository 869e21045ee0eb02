"""Each algorithm trains as its formula says, by a naive loop over full logits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from configs.load import load_run
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.presentation.tracking import read_metrics
from tests import naive
from tests.conftest import CHATML, VOCABULARY, make_llama, run_inline
from tests.small_training import NARROW

pytestmark = pytest.mark.ranks
# float32 sums taken in another order; see test_training.
RTOL = 1e-4


def run_until(run: RunConfig, until: str) -> dict[str, ArtifactRef]:
    """The stages of a run through `until`; training in worker processes."""
    return run_inline(run, until=until, launched={"train"})


def losses(done: dict[str, ArtifactRef]) -> list[float]:
    return [r["loss"] for r in read_metrics(Path(done["student"].uri) / "metrics.jsonl")]


def train_table(done: dict[str, ArtifactRef]) -> TokenTable:
    return TokenTable(Path(done["tokens"].uri) / "train.arrow")


def test_sft_is_cross_entropy_and_asks_no_teacher(
    make_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    """Of a student whose head is its embedding: that gets both gradients."""
    folder = tmp_path / "tied"
    make_llama(folder, hidden=32, layers=2, rows=416, seed=3, tied=True)
    copy_tokenizer(teacher_folder, folder)
    overrides = {"algorithm.type": "sft", "student.model.path": str(folder)}
    run = load_run(str(make_recipe(num_ranks=2, micro_batch_tokens=90)), overrides)
    done = run_until(run, "train")

    def example_loss(student: PreTrainedModel, row: naive.Row) -> torch.Tensor:
        return naive.cross_entropy(naive.logits_of(student, row, "student"), row)

    np.testing.assert_allclose(
        losses(done), naive.curve(run, train_table(done), example_loss), rtol=RTOL
    )
    heldout = TokenTable(Path(done["tokens"].uri) / "heldout.arrow")
    assert done["states"].counts["sequences"] == len(set(map(bytes, heldout.digests())))


def copy_tokenizer(source: Path, target: Path) -> None:
    for file in (*source.glob("*token*"), source / "chat_template.jinja"):
        shutil.copy(file, target)


@pytest.fixture
def two_sources(tmp_path: Path, data_file: Path) -> dict[str, Any]:
    """The sums in two files, as the data sources `low` and `high`."""
    lines = data_file.read_text().splitlines(keepends=True)
    sources = []
    for name, part in (("low", lines[: len(lines) // 2]), ("high", lines[len(lines) // 2 :])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(part))
        sources.append({"type": "files", "name": name, "path": str(path)})
    return {"data.sources": sources}


@pytest.fixture
def second_teacher(tmp_path: Path, teacher_folder: Path) -> dict[str, Any]:
    """Another teacher, of another width, with the same tokenizer files."""
    folder = tmp_path / "second"
    make_llama(folder, hidden=40, layers=2, rows=448, seed=7)
    copy_tokenizer(teacher_folder, folder)
    model = {"type": "pretrained", "path": str(folder)}
    return {"type": "transformers", "model": model, "dtype": "float32", "tokens_per_batch": 512}


@pytest.mark.parametrize("by", ["weight", "source"])
def test_several_teachers(
    make_recipe: Callable[..., Path],
    two_sources: dict[str, Any],
    second_teacher: dict[str, Any],
    by: str,
) -> None:
    shares = {
        "weight": ({"weight": 3.0}, {"weight": 1.0}),
        "source": ({"sources": ["low"]}, {"sources": ["high"]}),
    }[by]
    teachers = {"teacher": shares[0], "second": shares[1] | {"teacher": second_teacher}}
    algorithm = {"type": "multi_teacher", "teachers": teachers}
    overrides = two_sources | {"algorithm": algorithm}
    run = load_run(str(make_recipe(num_ranks=2, micro_batch_tokens=90)), overrides)
    done = run_until(run, "evaluate")
    first = naive.load(run.teacher.model.path)
    second = naive.load(second_teacher["model"]["path"])

    def example_loss(student: PreTrainedModel, row: naive.Row) -> torch.Tensor:
        student_NV = naive.logits_of(student, row, "student")
        kls = [
            naive.forward_kl(student_NV, naive.stored_logits(teacher, row))
            for teacher in (first, second)
        ]
        share = 0.75 if by == "weight" else float(row["source"] == "low")
        kl = share * kls[0] + (1 - share) * kls[1]
        return 0.1 * naive.cross_entropy(student_NV, row) + 0.9 * kl

    np.testing.assert_allclose(
        losses(done), naive.curve(run, train_table(done), example_loss), rtol=RTOL
    )
    counts = [done[name].counts["sequences"] for name in ("states", "states_second")]
    if by == "weight":
        assert counts[0] == counts[1]
    else:  # each teacher has seen its own samples only
        whole = {bytes(d) for s in ("train", "heldout") for d in table(done, s).digests()}
        assert sum(counts) == len(whole)


def table(done: dict[str, ArtifactRef], split: str) -> TokenTable:
    return TokenTable(Path(done["tokens"].uri) / f"{split}.arrow")


def test_dual_space(make_recipe: Callable[..., Path]) -> None:
    """Both models at both heads, over two ranks; the export is the student alone."""
    overrides = {
        "algorithm": {"type": "dual_space", "projector_lr": 0.01},
        "loss.kd_ratio": 0.5,
    }
    run = load_run(str(make_recipe(num_ranks=2, micro_batch_tokens=90)), overrides)
    done = run_until(run, "train")
    teacher, student = naive.load(run.teacher.model.path), naive.load(run.student.model.path)
    other_VG = teacher.lm_head.weight.detach()[:VOCABULARY]
    own_VH = student.lm_head.weight.detach()[:VOCABULARY]
    # h W' = (h P) W for all h, as nearly as can be: W' = W P^T.
    to_student, to_teacher = (
        torch.nn.Parameter(torch.linalg.lstsq(to.double(), of.double()).solution.T.float())
        for of, to in ((other_VG, own_VH), (own_VH, other_VG))
    )

    def example_loss(student: PreTrainedModel, row: naive.Row) -> torch.Tensor:
        states = {}
        for side, model in (("student", student), ("teacher", teacher)):
            supervised_T = torch.from_numpy(row[f"{side}_supervised"].astype(bool))[1:]
            hidden_BTH = model.model(torch.tensor(row[f"{side}_ids"]).long()[None])[0]
            states[side] = hidden_BTH[0, :-1][supervised_T]
        told_NG = states["teacher"].detach().bfloat16().float()
        head_VH = student.lm_head.weight[:VOCABULARY]
        projected_NV = told_NG @ to_student @ head_VH.detach().T
        student_NV = states["student"] @ head_VH.T
        both = naive.forward_kl(student_NV, projected_NV.detach()) + naive.forward_kl(
            states["student"] @ to_teacher @ other_VG.T, told_NG @ other_VG.T
        )
        return 0.5 * naive.cross_entropy(student_NV, row) + 0.5 * (
            both + naive.cross_entropy(projected_NV, row)
        )

    np.testing.assert_allclose(
        losses(done),
        naive.curve(run, train_table(done), example_loss, own=([to_student, to_teacher], 0.01)),
        rtol=RTOL,
    )
    exported = load_file(Path(done["student"].uri) / "model/model.safetensors")
    assert exported.keys() <= student.state_dict().keys()
    record = read_metrics(Path(done["student"].uri) / "metrics.jsonl")[-1]
    assert record["teacher_space"] > 0
    assert record["projected_cross_entropy"] > 0


TOLD = CHATML.replace("{% for m", "{{ '<|im_start|>system\nSums of small numbers.' }}{% for m", 1)


@pytest.mark.parametrize(
    "algorithm",
    [{"type": "dual_space", "projector_lr": 0.01}, {"type": "self_distillation", "update": "ema"}],
    ids=lambda algorithm: algorithm["type"],
)
def test_what_an_algorithm_has_of_its_own_trains_beside_narrow_weights(
    make_recipe: Callable[..., Path], student_folder: Path, algorithm: dict[str, Any]
) -> None:
    """On two ranks: projectors, and an average of the student that has no steps to lose."""
    curves = []
    for fields in ({"compute_dtype": "bfloat16"}, NARROW):
        overrides: dict[str, Any] = {"algorithm": algorithm}
        if algorithm["type"] == "self_distillation":
            overrides["teacher.model"] = {"type": "pretrained", "path": str(student_folder)}
        recipe = make_recipe(num_ranks=2, micro_batch_tokens=90, **fields)
        curves.append(losses(run_until(load_run(str(recipe), overrides), "train")))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("update", ["ema", "synchronized"])
def test_self_distillation(
    make_recipe: Callable[..., Path], student_folder: Path, update: str
) -> None:
    """The teacher sees more than the student, and its weights follow the student's."""
    overrides = {
        "algorithm": {"type": "self_distillation", "update": update, "decay": 0.5},
        "teacher.model.path": str(student_folder),
        "teacher.chat_template": {"template": TOLD},
        "loss.divergence": {"type": "reverse_kl"},
        "loss.kd_ratio": 0.5,
    }
    run = load_run(str(make_recipe(num_ranks=2, micro_batch_tokens=90)), overrides)
    done = run_until(run, "train")
    average = naive.load(student_folder)

    def example_loss(student: PreTrainedModel, row: naive.Row) -> torch.Tensor:
        student_NV = naive.logits_of(student, row, "student")
        with torch.no_grad():
            teacher_NV = naive.logits_of(average if update == "ema" else student, row, "teacher")
        # KL(student || teacher) is the forward KL of the pair the other way round.
        kl = naive.forward_kl(teacher_NV, student_NV)
        return 0.5 * naive.cross_entropy(student_NV, row) + 0.5 * kl

    def follow(student: PreTrainedModel) -> None:
        with torch.no_grad():
            for mine, new in zip(average.parameters(), student.parameters(), strict=True):
                mine.copy_(0.5 * mine + 0.5 * new)

    expected = naive.curve(run, train_table(done), example_loss, follow)
    np.testing.assert_allclose(losses(done), expected, rtol=RTOL)
    names = load_file(Path(done["student"].uri) / "model/model.safetensors").keys()
    assert not any("average" in name or "algorithm" in name for name in names)
