"""A student with another tokenizer than the teacher's."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.load import load_run
from configs.schema.run import RunConfig
from flows.cli import app
from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.errors import DataError, ModelError, WorkerError
from storage.errors import StoreCorruptError
from storage.log_probs import LogProbs
from storage.states.reader import HiddenStateReader
from storage.tokens import TokenTable
from tasks.checks.run_check import checked_plan
from tasks.jobs import scoring, teacher_pass
from tasks.jobs.stored import LOG_PROBS_FILE, TokenExamples
from tasks.presentation.alignment_view import aligned_samples, two_rows
from tasks.presentation.tracking import HELDOUT_FILE, METRICS_FILE, read_metrics
from tasks.rounds.rounds_at_work import RoundsAtWork
from tasks.stages.explanation import stage_status
from tasks.stages.identity import made_of, open_store, stage_spec
from tasks.stages.planning import plan_stages
from tests import naive
from tests.conftest import VOCABULARY, make_llama, make_tokenizer, run_inline
from tests.numerics.test_gold import trls_hybrid_loss

pytestmark = pytest.mark.ranks
OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = ["It is plus 12. 34. 101. 99? It is 7."] * 40


@pytest.fixture(scope="module")
def other_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was trained on other text, and a template of its own."""
    folder = tmp_path_factory.mktemp("other")
    texts = [text[::-1] for text in list(topics.values())[:40]] + WORDS
    make_tokenizer(folder, texts=texts, template=OTHER_TEMPLATE)
    make_llama(folder, hidden=32, layers=2, rows=416, seed=2)
    return folder


@pytest.fixture
def other_run(make_recipe: Callable[..., Path], other_student: Path) -> Callable[..., RunConfig]:
    def load(**overrides: Any) -> RunConfig:
        model = {"type": "pretrained", "path": str(other_student)}
        recipe = make_recipe(model=model, max_steps=12, lr=0.005)
        return load_run(str(recipe), {n.replace("__", "."): v for n, v in overrides.items()})

    return load


def student_of(run: RunConfig, until: str = "train") -> dict[str, Path]:
    done = run_inline(run, until=until, launched=["train"])
    return {name: Path(ref.uri) for name, ref in done.items()}


def test_one_tokenizer_aligned_by_bytes_is_the_exact_run(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """To the last bit: losses and weights."""
    recipe = str(make_recipe(max_steps=4))
    weights, metrics = [], []
    for mode in ("exact", "bytes"):
        storage = {"root": str(tmp_path / mode), "scratch": str(tmp_path / f"{mode}-scratch")}
        storage |= {"shard_rows": 256, "chunk_rows": 32}
        student = student_of(load_run(recipe, {"alignment": mode, "storage": storage}))["student"]
        weights.append((student / "model/model.safetensors").read_bytes())
        metrics.append([record["loss"] for record in read_metrics(student / METRICS_FILE)])
    assert metrics[0] == metrics[1]
    assert weights[0] == weights[1]


@pytest.fixture
def mixture(
    make_recipe: Callable[..., Path], data_file: Path, other_teacher: Path, tmp_path: Path
) -> Callable[..., RunConfig]:
    """A teacher with the student's tokenizer, and one with another tokenizer and template."""

    def load(shares: tuple[dict[str, Any], dict[str, Any]], **overrides: Any) -> RunConfig:
        lines = data_file.read_text().splitlines(keepends=True)
        sources = []
        for name, part in (("low", lines[:60]), ("high", lines[60:])):
            (tmp_path / f"{name}.jsonl").write_text("".join(part))
            path = str(tmp_path / f"{name}.jsonl")
            sources.append({"type": "files", "name": name, "path": path})
        model = {"type": "pretrained", "path": str(other_teacher)}
        second = {"type": "transformers", "model": model, "dtype": "float32"}
        teachers = {"teacher": shares[0], "second": shares[1] | {"teacher": second}}
        algorithm = {"type": "multi_teacher", "teachers": teachers}
        recipe = make_recipe(max_steps=4, num_ranks=2, micro_batch_tokens=90)
        return load_run(str(recipe), {"data.sources": sources, "algorithm": algorithm} | overrides)

    return load


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory, other_student: Path) -> Path:
    folder = tmp_path_factory.mktemp("other-teacher")
    shutil.copytree(other_student, folder, dirs_exist_ok=True)
    make_llama(folder, hidden=40, layers=2, rows=448, seed=9)
    return folder


SHARES = {
    "weight": ({"weight": 3.0}, {"weight": 1.0}),
    "source": ({"sources": ["low"]}, {"sources": ["high"]}),
}


@pytest.mark.parametrize("by", ["weight", "source"])
def test_teachers_of_two_tokenizers_teach_together(
    mixture: Callable[..., RunConfig], other_teacher: Path, by: str
) -> None:
    """Losses are those of full logits: the second teacher's by pairs and classes made by hand."""
    run = mixture(SHARES[by])
    done = student_of(run, until="report")
    folders = {"student": run.student.model.path, "teacher": str(other_teacher)}  # type: ignore[union-attr]
    first, second = naive.load(run.teacher.model.path), naive.load(other_teacher)  # type: ignore[union-attr]
    tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    tokens = {name: tokens_of(tokenizer) for name, tokenizer in tokenizers.items()}
    classes = classes_by_hand(tokens, tokenizers)

    def class_kl(student_NV: torch.Tensor, row: naive.Row) -> torch.Tensor:
        teacher_MV = naive.stored_logits(second, row, "second")
        total = student_NV.new_zeros(())
        for own, other in pairs_by_hand(row, tokens, "second"):
            q, p = (
                torch.zeros(2000).index_add(0, classes[name], logits.softmax(-1))
                for name, logits in (("student", student_NV[own]), ("teacher", teacher_MV[other]))
            )
            some = p > 0
            total = total + (p[some] * (p[some] / q[some]).log()).sum()
        return total

    def example_loss(student: Any, row: naive.Row) -> torch.Tensor:
        student_NV = naive.logits_of(student, row, "student")
        share = 0.75 if by == "weight" else float(row["source"] == "low")
        kl = share * naive.forward_kl(student_NV, naive.stored_logits(first, row))
        kl = kl + (1 - share) * class_kl(student_NV, row)
        return 0.1 * naive.cross_entropy(student_NV, row) + 0.9 * kl

    table = TokenTable(done["tokens"] / "train.arrow")
    assert table.views == ("student", "teacher", "second")
    losses = [record["loss"] for record in read_metrics(done["student"] / METRICS_FILE)]
    np.testing.assert_allclose(losses, naive.curve(run, table, example_loss), rtol=1e-4)
    models = json.loads((done["evaluation"] / "evaluation.json").read_text())["models"]
    assert models["student after"].keys() == {"all", "low", "high"}
    assert ("forward_kl" in models["teacher"]["high"]) == (by == "weight")
    page = (done["report"] / "report.html").read_text()
    assert "second: alignment: bytes" in page
    assert "high (second)" in page


def test_a_mixture_where_one_teacher_has_the_students_tokenizer(
    mixture: Callable[..., RunConfig], make_recipe: Callable[..., Path], teacher_folder: Path
) -> None:
    """What is for two tokenizers is for the other teacher; where there is none, it is refused."""
    setting = {"loss.compared_by": "shared_tail"}
    run = mixture(SHARES["weight"], **setting)
    done = student_of(run)
    folded = student_of(mixture(SHARES["weight"], **{"student.max_steps": 4}))
    losses = [
        [record["loss"] for record in read_metrics(own["student"] / METRICS_FILE)]
        for own in (done, folded)
    ]
    assert losses[0] != losses[1]
    second = {"type": "transformers", "model": {"type": "pretrained", "path": str(teacher_folder)}}
    teachers = {"teacher": {}, "second": {"teacher": second}}
    algorithm = {"algorithm": {"type": "multi_teacher", "teachers": teachers}}
    with pytest.raises(ModelError, match="all of the models have one"):
        checked_plan(load_run(str(make_recipe()), algorithm | setting), download=True)


def test_dual_space_compares_at_pairs(other_run: Callable[..., RunConfig]) -> None:
    """Losses are those of full logits over each side's own vocabulary, with projectors that begin
    as the least squares over the tokens that both have.
    """
    algorithm = {"type": "dual_space", "projector_lr": 0.01}
    run = other_run(algorithm=algorithm, loss__kd_ratio=0.5)
    done = student_of(run)
    folders = {name: getattr(run, name).model.path for name in ("student", "teacher")}
    models = {name: naive.load(folder) for name, folder in folders.items()}
    tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    tokens = {name: tokens_of(tokenizer) for name, tokenizer in tokenizers.items()}
    both = sorted((set(tokens["student"]) & set(tokens["teacher"])) - {b""})
    heads = {name: model.lm_head.weight.detach()[:VOCABULARY] for name, model in models.items()}
    rows = {
        name: heads[name][[*map(own.index, both), tokenizers[name].eos_token_id]].double()
        for name, own in tokens.items()
    }
    to_student, to_teacher = (
        torch.nn.Parameter(torch.linalg.lstsq(rows[to], rows[of]).solution.T.float())
        for of, to in (("teacher", "student"), ("student", "teacher"))
    )

    def states_of(model: Any, row: naive.Row, view: str) -> torch.Tensor:
        supervised_T = torch.from_numpy(row[f"{view}_supervised"].astype(bool))[1:]
        ids_BT = torch.tensor(row[f"{view}_ids"]).long()[None]
        return model.model(ids_BT)[0][0, :-1][supervised_T]

    def example_loss(student: Any, row: naive.Row) -> torch.Tensor:
        own, other = np.array(pairs_by_hand(row, tokens, "teacher")).T
        own_NH = states_of(student, row, "student")
        told_KG = states_of(models["teacher"], row, "teacher").detach()[other].bfloat16().float()
        head_VH = student.lm_head.weight[:VOCABULARY]
        projected_KV = told_KG @ to_student @ head_VH.detach().T
        targets_K = torch.from_numpy(targets(row, "student")[own]).long()
        kd = naive.forward_kl(own_NH[own] @ head_VH.T, projected_KV.detach())
        kd = kd + torch.nn.functional.cross_entropy(projected_KV, targets_K, reduction="sum")
        moved_KW = own_NH[own] @ to_teacher @ heads["teacher"].T
        kd = kd + naive.forward_kl(moved_KW, told_KG @ heads["teacher"].T)
        return 0.5 * naive.cross_entropy(own_NH @ head_VH.T, row) + 0.5 * kd

    table = TokenTable(done["tokens"] / "train.arrow")
    losses = [record["loss"] for record in read_metrics(done["student"] / METRICS_FILE)]
    own = ([to_student, to_teacher], 0.01)
    np.testing.assert_allclose(losses, naive.curve(run, table, example_loss, own=own), rtol=1e-4)


def test_gold_is_trls(other_run: Callable[..., RunConfig]) -> None:
    """Losses are those of TRL's merged spans and hybrid loss, from full logits; by a live teacher
    the same.
    """
    gold = {"algorithm": {"type": "gold"}, "loss__kd_ratio": 0.5, "student__max_steps": 4}
    run = other_run(**gold)
    done = student_of(run)
    live = losses_of(student_of(other_run(delivery="live", **gold)))
    np.testing.assert_allclose(live, losses_of(done), rtol=1e-4)
    folders = {name: getattr(run, name).model.path for name in ("student", "teacher")}
    teacher = naive.load(folders["teacher"])
    tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    tokens = {name: tokens_of(tokenizer) for name, tokenizer in tokenizers.items()}
    both = sorted((set(tokens["student"]) & set(tokens["teacher"])) - {b""})
    ids = {
        name: [*map(own.index, both), tokenizers[name].eos_token_id] for name, own in tokens.items()
    }
    trl = trls_hybrid_loss(torch.tensor([ids["student"], ids["teacher"]]).T)

    def example_loss(student: Any, row: naive.Row) -> torch.Tensor:
        logits = {
            "student": naive.logits_of(student, row, "student"),
            "teacher": naive.stored_logits(teacher, row),
        }
        ends = {
            name: np.cumsum([len(own[i]) for i in targets(row, name)])
            for name, own in tokens.items()
        }
        groups = trl._align_by_byte_offsets(
            *([(0, end) for end in ends[name][:-1].tolist()] for name in logits)
        )
        for name, own in zip(logits, groups, strict=True):
            own.append([len(ends[name]) - 1])  # the ends of the turn
        merged = [
            trl._merge_probabilities_with_alignment_groups(
                logits[name].softmax(-1), own, targets(row, name).tolist()
            )
            for name, own in zip(logits, groups, strict=True)
        ]
        hybrid = trl._compute_hybrid_uld_loss(*merged) * len(groups[0])
        return 0.5 * naive.cross_entropy(logits["student"], row) + 0.5 * hybrid

    table = TokenTable(done["tokens"] / "train.arrow")
    records = read_metrics(done["student"] / METRICS_FILE)
    losses = [record["loss"] for record in records]
    np.testing.assert_allclose(losses, naive.curve(run, table, example_loss), rtol=1e-4)


@pytest.mark.parametrize("kind", ["dual_space", "gold"])
def test_a_comparison_of_its_own_is_refused_what_it_does_not_read(
    make_recipe: Callable[..., Path], other_run: Callable[..., RunConfig], kind: str
) -> None:
    algorithm = {"type": kind}
    for setting in (
        {"loss__compared_by": "shared_tail"},
        {"loss__span_share": 0.5},
        {"loss__divergence": {"type": "sampled_reverse_kl"}},
    ):
        with pytest.raises(ConfigError, match=rf"is not for algorithm\.type={kind}"):
            other_run(algorithm=algorithm, **setting)
    with pytest.raises(ConfigError, match=f"vocabulary_parallel is not for {kind}"):
        other_run(algorithm=algorithm, student__vocabulary_parallel=True)
    # Each comparison of the one is over one vocabulary; the other has its own divergence.
    single = {"alignment": "bytes", "loss__divergence": {"type": "alpha_beta"}}
    if kind == "dual_space":
        other_run(algorithm=algorithm, **single)
        return
    with pytest.raises(ConfigError, match=r"loss\.divergence is not for algorithm\.type=gold"):
        other_run(algorithm=algorithm, **single)
    same = load_run(str(make_recipe()), {"algorithm": algorithm})
    with pytest.raises(ModelError, match=r"algorithm\.type=gold is for two tokenizers"):
        checked_plan(same, download=True)


def targets(row: naive.Row, view: str) -> np.ndarray:
    return np.asarray(row[f"{view}_ids"])[row[f"{view}_supervised"].astype(bool)]


def pairs_by_hand(
    row: naive.Row, tokens: dict[str, list[bytes]], view: str
) -> list[tuple[int, int]]:
    """Supervised tokens that begin at one byte, the student's first; and the ends of the turn."""
    begins = []
    for side, own in (("student", tokens["student"]), (view, tokens["teacher"])):
        lengths = [len(own[i]) for i in targets(row, side)]
        begins.append({sum(lengths[:k]): k for k in range(len(lengths)) if lengths[k]})
        begins[-1][-1] = len(lengths) - 1
    return [(begins[0][b], begins[1][b]) for b in sorted(begins[0].keys() & begins[1].keys())]


def test_what_a_mixture_of_tokenizers_is_refused(mixture: Callable[..., RunConfig]) -> None:
    run = mixture(SHARES["weight"], alignment="exact")
    with pytest.raises(ModelError, match=r"algorithm\.teachers\.second: .* different vocabularies"):
        checked_plan(run, download=True)
    answers = {"by": "teacher", "temperature": 0.0, "engine": {"type": "transformers"}}
    with pytest.raises(ModelError, match=r"algorithm\.teachers\.second reads others"):
        checked_plan(mixture(SHARES["weight"], **{"data.answers": answers}), download=True)
    classes = {"loss.divergence": {"type": "top1_cross_entropy"}}
    with pytest.raises(ModelError, match=r"algorithm\.teachers\.second: .* of single tokens"):
        checked_plan(mixture(SHARES["weight"], **classes), download=True)


def test_a_student_of_another_tokenizer_learns(other_run: Callable[..., RunConfig]) -> None:
    """The held-out KL of classes falls; and what evaluation says is what full logits say."""
    run = other_run(eval__every_steps=6, loss__kd_ratio=1.0)
    done = student_of(run, until="report")
    curve = read_metrics(done["student"] / HELDOUT_FILE)
    forward = [point["forward_kl"] for point in curve]
    assert forward[-1] < 0.9 * forward[0]
    models = json.loads((done["evaluation"] / "evaluation.json").read_text())["models"]
    scores = {name: own["all"] for name, own in models.items()}
    assert scores["student after"]["forward_kl"] == pytest.approx(forward[-1], rel=1e-4)
    assert scores["student after"]["bits_per_byte"] < scores["student before"]["bits_per_byte"]
    assert scores["teacher"]["forward_kl"] < 1e-3
    assert scores["student after"]["num_compared"] < scores["student after"]["num_tokens"]
    examples = TokenExamples(TokenTable(done["tokens"] / "heldout.arrow"))
    assert 0.5 < scores["teacher"]["shared_mass"] < 1
    page = (done["report"] / "report.html").read_text()
    assert f"{100 * scores['teacher']['shared_mass']:.1f} %" in page
    wanted = naive_scores(run, done["student"] / "model", examples)
    for name, value in wanted.items():
        assert scores["student after"][name] == pytest.approx(value, rel=2e-2), name


def naive_scores(run: RunConfig, student: Path, examples: TokenExamples) -> dict[str, float]:
    """From full logits in float64: pairs and classes by loops over the bytes of decoded tokens."""
    folders = {"student": student, "teacher": Path(run.teacher.model.path)}  # type: ignore[union-attr]
    models = {
        n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for n, f in folders.items()
    }
    tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    tokens = {name: tokens_of(tokenizer) for name, tokenizer in tokenizers.items()}
    classes = classes_by_hand(tokens, tokenizers)
    shared = [i for i, t in enumerate(tokens["student"]) if t and t in tokens["teacher"]]
    shared.append(tokenizers["student"].eos_token_id)
    kl, compared, nats, size, mass = 0.0, 0, 0.0, 0, 0.0
    for index in range(len(examples)):
        log_probs, begins, ends = {}, {}, {}
        for name in folders:
            sequence = examples[index].views[name]
            ids = torch.tensor(sequence.ids_T).long()
            with torch.no_grad():
                logits = models[name](ids[None]).logits[0, :, : len(tokens[name])]
            rows = sequence.target_positions_N - 1
            log_probs[name] = logits[rows].log_softmax(-1)
            lengths = [len(tokens[name][i]) for i in sequence.target_ids_N]
            begins[name] = {int(np.sum(lengths[:k])): k for k in range(len(lengths)) if lengths[k]}
            ends[name] = len(lengths) - 1
            if name == "student":
                target = torch.tensor(sequence.target_ids_N).long()[:, None]
                nats -= float(log_probs[name].gather(-1, target).sum())
                size += sum(lengths)
        pairs = [
            (begins["student"][b], begins["teacher"][b])
            for b in begins["student"].keys() & begins["teacher"].keys()
        ]
        for own, other in [*pairs, (ends["student"], ends["teacher"])]:
            q, p = (
                torch.zeros(2000, dtype=torch.float64).index_add(
                    0, classes[name], log_probs[name][row].exp()
                )
                for name, row in (("student", own), ("teacher", other))
            )
            some = p > 0
            mass += float(log_probs["student"][own, shared].exp().sum())
            kl += float((p[some] * (p[some] / q[some]).log()).sum())
            compared += 1
    return {
        "forward_kl": kl / compared,
        "num_compared": compared,
        "shared_mass": mass / compared,
        "bits_per_byte": nats / size / np.log(2),
    }


def tokens_of(tokenizer: Any) -> list[bytes]:
    """The bytes of every id, by GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}
    tokens = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, number in tokenizer.get_vocab().items():
        if token not in tokenizer.all_special_tokens and not token.startswith("<|"):
            tokens[number] = bytes(letters[letter] for letter in token)
    return tokens


def classes_by_hand(tokens: dict[str, list[bytes]], tokenizers: Any) -> dict[str, torch.Tensor]:
    shared = sorted((set(tokens["student"]) & set(tokens["teacher"])) - {b""})
    number = {token: k for k, token in enumerate(shared)}
    number |= {token: number[b" "] for token in shared if not token.strip(b" ")}
    ends = {tokenizers[name].eos_token_id for name in tokens}
    other = {"student": "teacher", "teacher": "student"}

    def of(token: bytes, side: str) -> int:
        while token not in number:
            side = other[side]
            text = token.decode(errors="surrogateescape")
            cut = tokenizers[side](text, add_special_tokens=False)["input_ids"]
            token = tokens[side][cut[0]]
        return number[token]

    return {
        name: torch.tensor(
            [1999 if i in ends else 1998 if not t else of(t, name) for i, t in enumerate(own)]
        )
        for name, own in tokens.items()
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TokenSequence]:
    """What teachers in this process are asked for."""
    build, asked = teacher_pass.build_engine, []

    def counting(*args: Any, **kwargs: Any) -> TeacherEngine:
        engine = build(*args, **kwargs)
        forward = engine.forward
        monkeypatch.setattr(engine, "forward", lambda batch: asked.extend(batch) or forward(batch))
        return engine

    monkeypatch.setattr(teacher_pass, "build_engine", counting)
    return asked


def test_a_teacher_reads_a_text_once_for_students_of_any_tokenizer(
    make_recipe: Callable[..., Path],
    other_run: Callable[..., RunConfig],
    asked: list[TokenSequence],
) -> None:
    """Their states are copied bit for bit; of a sequence that is new, the teacher is asked."""
    first = load_run(str(make_recipe()), {"data.sources.0.max_samples": 40})
    store = open_store(first)
    earlier = HiddenStateReader(store=store, ref=run_inline(first, until="extract")["states"])
    for run, new in [
        (other_run(data__sources__0__max_samples=40), False),
        (other_run(data__sources__0__max_samples=50), True),
        # What a lossy codec has stored is copied by nobody, what was stored exactly is compressed.
        (other_run(data__sources__0__max_samples=40, storage__codec="int8"), False),
    ]:
        asked.clear()
        done = run_inline(run, until="extract")
        assert done["tokens"].digest != run_inline(first, until="tokenize")["tokens"].digest
        reader = HiddenStateReader(store=store, ref=done["states"])
        same = 0
        for name in ("train", "heldout"):
            table = TokenTable(Path(done["tokens"].uri) / f"{name}.arrow")
            for example in (TokenExamples(table)[i] for i in range(len(table))):
                teacher = example.teacher
                rows_NH = reader.rows(teacher.digest, teacher.target_ids_N)
                if earlier.holds(np.frombuffer(teacher.digest, np.uint8)[None])[0]:
                    same += 1
                    if run.storage.codec == "raw":
                        wanted_NH = earlier.rows(teacher.digest, teacher.target_ids_N)
                        np.testing.assert_array_equal(rows_NH, wanted_NH)
                else:
                    assert teacher.digest in {sequence.digest for sequence in asked}
        assert same > 20
        assert len({sequence.digest for sequence in asked}) == len(reader) - same
        assert bool(asked) == new


@pytest.mark.parametrize(
    ("shard_rows", "until"), [(128, "extract"), (256, "train")], ids=["copied", "taken over"]
)
def test_damaged_states_of_another_run_are_named_when_they_are_read(
    make_recipe: Callable[..., Path],
    other_run: Callable[..., RunConfig],
    shard_rows: int,
    until: str,
) -> None:
    """Shards of another size are copied row by row, others taken over unread."""
    few = {"data.sources.0.max_samples": 40}
    first = load_run(str(make_recipe()), few)
    earlier = run_inline(first, until="extract")["states"]
    shard = next(Path(earlier.uri).rglob("hidden/c/0/0/0/0"))
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    run = other_run(data__sources__0__max_samples=40, storage__shard_rows=shard_rows)
    says = f"{earlier.digest}, from which" if until == "extract" else "are not those"
    error = StoreCorruptError if until == "extract" else WorkerError
    with pytest.raises(error, match=f"{says} .* --repair"):
        run_inline(run, until=until, launched=["train"])
    repair = ["store", "--root", run.storage.root, "--scratch", run.storage.scratch]
    assert "removed" in CliRunner().invoke(app, [*repair, "verify", "--repair"]).output
    again = run_inline(run, until=until, launched=["train"])["states"]
    assert len(HiddenStateReader(store=open_store(run), ref=again)) > 0


def test_live_is_replay(other_run: Callable[..., RunConfig]) -> None:
    losses = []
    for delivery in ("replay", "live"):
        student = student_of(other_run(delivery=delivery, teacher__tokens_per_batch=1))["student"]
        losses.append([record["loss"] for record in read_metrics(student / METRICS_FILE)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"alignment": "exact"}, "different vocabularies: .* or set alignment=bytes"),
        ({"loss.divergence.type": "top1_cross_entropy"}, "of single tokens, not of classes"),
        ({"student.vocabulary_parallel": True}, "classes need whole output heads"),
    ],
)
def test_what_does_not_go_with_two_tokenizers_is_refused_at_planning(
    other_run: Callable[..., RunConfig], overrides: dict[str, Any], message: str
) -> None:
    run = other_run(**{name.replace(".", "__"): value for name, value in overrides.items()})
    with pytest.raises(ModelError, match=message):
        checked_plan(run, download=True)


def test_the_alignment_is_shown(other_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Two rows of tokens, and the share of each source in the report."""
    run = other_run(student__max_steps=1)
    done = student_of(run, until="report")
    (sample,) = aligned_samples(run, "heldout", 1)
    for own, other in sample.spans[:-1]:
        assert own.replace("·", "") == other.replace("·", "")
    assert sample.spans[-1] == ("END", "END")
    first, second = list(two_rows(sample.spans))[:2]
    assert [place for place, letter in enumerate(first) if letter == "│"] == [
        place for place, letter in enumerate(second) if letter == "│"
    ]
    page = (done["report"] / "report.html").read_text()
    assert "<h2>Alignment</h2>" in page
    assert "bits per byte" in page
    command = ["show", "alignment", str(tmp_path / "tiny.yaml"), "student.max_steps=1"]
    shown = CliRunner().invoke(app, command)
    assert first in shown.output, shown.output


def test_a_plan_says_how_far_two_tokenizers_agree(
    make_recipe: Callable[..., Path], other_run: Callable[..., RunConfig]
) -> None:
    """Once the tokens are there."""
    for run, said in ((other_run(), True), (load_run(str(make_recipe())), False)):
        assert not any("alignment: " in r for r in tokenize_reasons(run))
        run_inline(run, until="tokenize")
        first, *rest = tokenize_reasons(run)
        assert first.startswith(f"alignment: {'bytes' if said else 'padded'}; student and teacher")
        assert any(re.search(r"\d+\.\d% of the student's", r) for r in rest) == said


def tokenize_reasons(run: RunConfig) -> tuple[str, ...]:
    statuses = {s.identity.stage: s for s in stage_status(run, plan_stages(run))}
    return statuses["tokenize"].reasons


def test_one_vocabulary_has_no_alignment_to_show(make_recipe: Callable[..., Path]) -> None:
    run = load_run(str(make_recipe()))
    with pytest.raises(DataError, match="run it first"):
        aligned_samples(run, "heldout", 1)
    run_inline(run, until="tokenize")
    with pytest.raises(DataError, match="are compared token by token"):
        aligned_samples(run, "heldout", 1)


# Both together in value and gradient: tests/numerics/test_span_likelihood.
@pytest.mark.parametrize("share", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_student_learns_from_the_likelihood_of_spans(
    other_run: Callable[..., RunConfig], share: float
) -> None:
    run = other_run(loss__span_share=share, loss__kd_ratio=1.0)
    done = student_of(run, until="report")
    records = read_metrics(done["student"] / METRICS_FILE)
    assert records[-1]["span"] < 0.7 * records[0]["span"]
    assert "likelihood of spans" in (done["report"] / "report.html").read_text()


def losses_of(done: dict[str, Path]) -> list[float]:
    return [record["loss"] for record in read_metrics(done["student"] / METRICS_FILE)]


def test_of_spans_alone_log_probabilities_are_stored_and_no_states(
    other_run: Callable[..., RunConfig],
) -> None:
    """Training by them is training with the teacher beside it; they are those of full logits."""
    spans = {"loss__span_share": 1.0, "loss__kd_ratio": 0.8, "teacher__tokens_per_batch": 1}
    run = other_run(**spans)
    done = student_of(run)
    live = student_of(other_run(delivery="live", **spans))
    np.testing.assert_allclose(losses_of(done), losses_of(live), rtol=1e-5)
    assert "kd" not in read_metrics(done["student"] / METRICS_FILE)[0]
    table = TokenTable(done["tokens"] / "train.arrow")
    states = HiddenStateReader(
        store=open_store(run), ref=run_inline(run, until="extract")["states"]
    )
    assert not states.holds(table.digests("teacher")).any()
    stored, teacher = LogProbs(done["log_probs"] / LOG_PROBS_FILE), naive.load(teacher_of(run))
    for index in range(0, len(table), 9):
        sequence = TokenExamples(table)[index].teacher
        rows, targets = sequence.target_positions_N - 1, sequence.target_ids_N
        with torch.no_grad():
            logits_TV = teacher(torch.tensor(sequence.ids_T).long()[None]).logits[0]
        log_p_NV = logits_TV[rows, :VOCABULARY].double().log_softmax(-1)
        expected_N = log_p_NV[torch.arange(len(rows)), torch.tensor(targets).long()]
        found_N = stored.of(sequence.digest, len(rows))
        np.testing.assert_allclose(found_N, expected_N, atol=0.05)  # states are bfloat16


def teacher_of(run: RunConfig) -> str:
    assert run.teacher.model.type == "pretrained"
    return run.teacher.model.path


def test_what_was_read_or_scored_is_not_read_again(
    other_run: Callable[..., RunConfig],
    asked: list[TokenSequence],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """States that are stored are scored as they stand; a scoring that was stopped goes on with the
    parts that it has, in the very bytes that another number of ranks writes.
    """
    monkeypatch.setattr(scoring, "PART_SEQUENCES", 16)
    # This process and both ranks have one thread: on some processors the last bits go by that.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    spans = {"loss__span_share": 1.0, "teacher__tokens_per_batch": 1}
    run_inline(other_run(teacher__tokens_per_batch=1), until="extract")
    asked.clear()
    whole = run_inline(other_run(**spans), until="score-tokens")["log_probs"]
    assert not asked
    content = (Path(whole.uri) / LOG_PROBS_FILE).read_bytes()

    def elsewhere(name: str, **more: Any) -> RunConfig:
        root, scratch = str(tmp_path / name), str(tmp_path / f"{name}-scratch")
        return other_run(storage__root=root, storage__scratch=scratch, **spans, **more)

    run, write, written = elsewhere("stopped"), scoring._write, []

    def stopping(path: Path, values: np.ndarray) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, values)
        written.append(len(values))

    monkeypatch.setattr(scoring, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_inline(run, until="score-tokens")
    monkeypatch.setattr(scoring, "_write", write)
    before = {sequence.digest for sequence in asked}
    asked.clear()
    again = run_inline(run, until="score-tokens")["log_probs"]
    assert len({sequence.digest for sequence in asked} - before) > 0
    assert len(asked) <= again.counts["sequences"] - 3 * 16
    assert (Path(again.uri) / LOG_PROBS_FILE).read_bytes() == content
    two = elsewhere("two", teacher__num_ranks=2)
    ref = run_inline(two, until="score-tokens", launched=["score-tokens"])["log_probs"]
    assert (Path(ref.uri) / LOG_PROBS_FILE).read_bytes() == content


@pytest.mark.parametrize(
    "loss",
    [
        {"compared_by": "ranks", "divergence": {"type": "total_variation"}},
        {"compared_by": "shared_tail", "divergence": {"type": "forward_kl"}},
        pytest.param({"compared_by": "byte_prefix"}, marks=pytest.mark.slow),
        pytest.param({"compared_by": "first_piece"}, marks=pytest.mark.slow),
    ],
)
def test_a_student_learns_by_other_maps_of_the_vocabularies(
    other_run: Callable[..., RunConfig], loss: dict[str, Any]
) -> None:
    run = other_run(**{f"loss__{name}": value for name, value in loss.items()}, loss__kd_ratio=1.0)
    records = read_metrics(student_of(run)["student"] / METRICS_FILE)
    assert records[-1]["kd"] < 0.8 * records[0]["kd"]


def test_a_pair_that_was_in_order_is_looked_at_again_for_another_loss(
    other_run: Callable[..., RunConfig],
) -> None:
    checked_plan(other_run(), download=True)
    with pytest.raises(ModelError, match="of single tokens, not of classes"):
        checked_plan(other_run(loss__divergence={"type": "alpha_beta"}), download=True)


LEARNED_WITHIN = {
    "loss.within_classes": True,
    "loss.divergence": {"type": "reverse_kl"},
    "data.answers": {"by": "student", "engine": {"type": "transformers"}},
}


def test_what_is_for_two_tokenizers_is_refused_between_equal_ones(
    make_recipe: Callable[..., Path],
) -> None:
    for setting, alignment in (
        ({"loss.span_share": 1.0}, "auto"),
        ({"loss.compared_by": "ranks"}, "auto"),
        (LEARNED_WITHIN, "auto"),
        ({"loss.compared_by": "shared_tail"}, "bytes"),
    ):
        run = load_run(str(make_recipe()), setting | {"alignment": alignment})
        with pytest.raises(ModelError, match="is for two tokenizers, and student and teacher"):
            checked_plan(run, download=True)
        with pytest.raises(ConfigError, match="for two tokenizers, and alignment=exact asks"):
            load_run(str(make_recipe()), setting | {"alignment": "exact"})


# What the student writes: the rounds below.
@pytest.mark.parametrize("by", ["teacher", pytest.param("student", marks=pytest.mark.slow)])
def test_answers_that_a_model_writes_are_read_by_both(
    other_run: Callable[..., RunConfig], by: str
) -> None:
    answers = {
        "by": by,
        "temperature": 0.0,
        "max_new_tokens": 12,
        "engine": {"type": "transformers"},
    }
    run = other_run(data__answers=answers, student__max_steps=2)
    done = student_of(run)
    examples = TokenExamples(TokenTable(done["answers"] / "train.arrow"))
    folders = {side: Path(made_of(run, side).path) for side in ("student", "teacher")}  # type: ignore[union-attr, arg-type]
    tokens = {side: tokens_of(AutoTokenizer.from_pretrained(f)) for side, f in folders.items()}
    for example in (examples[i] for i in range(len(examples))):
        texts = {
            side: b"".join(tokens[side][i] for i in example.views[side].target_ids_N)
            for side in tokens
        }
        other = {"teacher": "student", "student": "teacher"}[by]
        texts[other].decode()
        assert texts[by].startswith(texts[other])
        rest = texts[by][len(texts[other]) :]
        if rest:  # what random models write is often no UTF-8
            with pytest.raises(UnicodeDecodeError):
                rest[:4].decode()
    assert read_metrics(done["student"] / METRICS_FILE)[-1]["kd"] > 0


REVERSE_KL = {"loss__divergence": {"type": "reverse_kl"}}


@pytest.mark.parametrize(
    ("settings", "term"),
    [
        (REVERSE_KL, None),
        (REVERSE_KL | {"loss__within_classes": True}, "within_classes"),
        ({"algorithm": {"type": "gold"}}, "kd"),
        (REVERSE_KL | {"algorithm": {"type": "dual_space"}}, "teacher_space"),
    ],
)
def test_rounds_on_the_students_own_answers(
    other_run: Callable[..., RunConfig], settings: dict[str, Any], term: str | None
) -> None:
    """The student trains on the very ids that it sampled, the teacher reads them as text."""
    numbers = [1] if term else [1, 2, 3]
    on_policy = {
        "rounds": len(numbers),
        "prompts_per_round": 24,
        "max_new_tokens": 16,
        "heldout_sequences": 8,
        "rollout": {"type": "transformers", "dtype": "float32"},
    }
    run = other_run(
        mode="onpolicy",
        on_policy=on_policy,
        loss__kd_ratio=1.0,
        student__max_steps=None,
        **settings,
    )
    done = run_inline(run, until="extract")
    spec = stage_spec(plan_stages(run)["train"], run, done)
    with RoundsAtWork(spec, logging.getLogger("test")) as work:
        records = []
        for number in numbers:
            work.roll_out(number)
            work.score(number)
            records.append(work.record(work.train(number)))
        student = work.export()
    assert student.counts["rounds"] == len(numbers)
    for record in records:
        assert record.log_prob_difference is not None
        assert record.log_prob_difference["largest"] < 1e-4
        # What random models write is often no UTF-8, and seldom what a tokenizer would write.
        assert record.translated is not None
        assert record.translated["answers"] == record.answers
        assert record.translated["tokens"] == record.answer_tokens
        assert 0 < record.translated["paired"] < record.translated["tokens"]
        assert record.translated["not_canonical"] + record.translated["invalid_utf8"] > 0
    steps = read_metrics(Path(student.uri) / METRICS_FILE)
    if term:
        assert all(step[term] != 0 for step in steps)
        return
    before, after = records[0].heldout_before, records[-1].heldout
    assert before is not None
    assert after is not None
    assert after["reverse_kl"] < 0.95 * before["reverse_kl"]
