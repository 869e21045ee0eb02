"""On-policy rounds with real engines and ranks, without Prefect: what is sampled is what is scored
and trained, new weights are served, and what is done is not done again.
"""

import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.data.chat import ChatFormat
from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import WorkerGroup
from kdflow_core.workers.group import RankGroup
from storage.rollouts import read_rollouts
from tasks.jobs.round_examples import round_examples
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import TokenExamples
from tasks.presentation.tracking import read_metrics
from tasks.rounds.round_record import RoundRecord, RoundRequest
from tasks.rounds.rounds_at_work import RoundsAtWork
from tasks.stages.catalogue import ROLLOUTS
from tasks.stages.identity import open_store, stage_spec
from tasks.stages.planning import plan_stages
from tests.conftest import VOCABULARY, SilentReporter, run_inline

pytestmark = pytest.mark.ranks
LOG = logging.getLogger("test")
NEW_TOKENS = 24
SGLANG = {"type": "sglang", "dtype": "float32", "max_running": 16, "bucket_mb": 1}
# SGLang's log-probabilities are the trainer's of the very ids: the rounds below.
ENGINES = [
    {"type": "transformers", "dtype": "float32"},
    pytest.param(SGLANG, marks=pytest.mark.slow),
]
REVERSE_KL = {"loss.divergence": {"type": "reverse_kl"}, "loss.kd_ratio": 1.0}


def load(make_recipe: Callable[..., Path], more: dict[str, Any], **on_policy: Any) -> RunConfig:
    section = {
        "rounds": 2,
        "prompts_per_round": 16,
        "max_new_tokens": NEW_TOKENS,
        "heldout_sequences": 8,
        "rollout": {"type": "transformers", "dtype": "float32"},
    }
    overrides = {"mode": "onpolicy", "on_policy": section | on_policy} | REVERSE_KL | more
    return load_run(str(make_recipe(max_steps=None, num_ranks=2, lr=0.002)), overrides)


@contextmanager
def at_work(run: RunConfig) -> Iterator[RoundsAtWork]:
    done = run_inline(run, until="extract")
    with RoundsAtWork(stage_spec(plan_stages(run)["train"], run, done), LOG) as at_work:
        yield at_work


def train(work: RoundsAtWork, rounds: int) -> list[RoundRecord]:
    records = []
    for number in range(1, rounds + 1):
        work.roll_out(number)
        work.score(number)
        records.append(work.record(work.train(number)))
    return records


def rows_of(work: RoundsAtWork, number: int) -> list[dict[str, Any]]:
    ref = work.find(ROLLOUTS, number)
    assert ref is not None
    return read_rollouts(Path(ref.uri))


def is_greedy(model: PreTrainedModel, row: dict[str, Any]) -> bool:
    ids = np.concatenate([row["prompt_ids"], row["answer_ids"]])
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(ids).long()[None]).logits[0, :, :VOCABULARY]
    rows = range(len(row["prompt_ids"]) - 1, len(ids) - 1)
    return all(
        logits_TV[i, token] > logits_TV[i].max() - 1e-3
        for i, token in zip(rows, row["answer_ids"], strict=True)
    )


@pytest.mark.parametrize(
    ("rounds", "weights", "lora"),
    [
        pytest.param(5, "tensor", None, marks=pytest.mark.slow),  # the way in: test_rollout
        (3, "broadcast", {"rank": 8}),
    ],
)
def test_rounds_with_sglang(
    make_recipe: Callable[..., Path], rounds: int, weights: str, lora: dict[str, int] | None
) -> None:
    """The held-out reverse KL falls from round to round, and engines and trainer agree on the
    log-probabilities of what was sampled: with adapters, which the engines have merged, too.
    """
    more = {"student.lora": lora, "student.lr": 0.02 if lora else 0.002}
    engines = 2 if weights == "broadcast" else 1
    rollout = SGLANG | {"weights": weights, "num_engines": engines}
    run = load(make_recipe, more, rounds=rounds, rollout=rollout, samples_per_prompt=2)
    with at_work(run) as work:
        records = train(work, rounds)
        steps = [r["step"] for r in read_metrics(metrics_of(work))]
        student = work.export()
    assert records[0].heldout_before is not None
    falling = [records[0].heldout_before, *(r.heldout for r in records)]
    losses = [scores["reverse_kl"] for scores in falling if scores is not None]
    assert len(losses) == 1 + rounds
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert steps == list(range(1, 4 * rounds + 1))  # 4 steps of 8 answers a round
    for number, record in enumerate(records, 1):
        assert record.version == number - 1
        assert record.staleness == 0
        assert record.answers == 32
        assert record.log_prob_difference is not None
        assert record.log_prob_difference["largest"] < 1e-4
        assert {row["version"] for row in rows_of(work, number)} == {number - 1}
    assert student.counts == {"steps": 4 * rounds, "rounds": rounds}


def metrics_of(work: RoundsAtWork) -> Path:
    scratch = Path(work.spec.run.storage.scratch)
    return scratch / "student" / work.spec.identity.digest / "artifact/metrics.jsonl"


@pytest.mark.slow  # the log-probabilities above tell of wrong weights
@pytest.mark.parametrize(("weights", "lora"), [("tensor", None), ("broadcast", {"rank": 4})])
def test_the_engine_serves_the_trained_weights(
    make_recipe: Callable[..., Path], student_folder: Path, weights: str, lora: dict[str, int]
) -> None:
    """After a swap, its greedy answers are transformers' with the weights that are exported, and
    its log-probabilities the trainer's: with adapters, which the engine has merged, too.
    """
    more = {"student.lora": lora, "student.lr": 0.02 if lora else 0.002}
    run = load(make_recipe, more, rounds=2, top_k=1, rollout=SGLANG | {"weights": weights})
    with at_work(run) as work:
        records = train(work, 2)
        work.roll_out(3)  # by the weights that the two rounds have trained
        answers = rows_of(work, 3)
        student = work.export()
    for record in records:
        assert record.log_prob_difference is not None
        assert record.log_prob_difference["largest"] < 1e-4
    assert {row["version"] for row in answers} == {2}
    folder = Path(student.uri) / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    assert all(is_greedy(trained, row) for row in answers)
    assert not all(is_greedy(before, row) for row in answers)
    assert all(is_greedy(before, row) for row in rows_of(work, 1))


@pytest.mark.parametrize("rollout", ENGINES, ids=["transformers", "sglang"])
def test_what_is_trained_is_what_was_sampled(
    make_recipe: Callable[..., Path],
    teacher_folder: Path,
    student_folder: Path,
    rollout: dict[str, Any],
) -> None:
    """One step over all answers of a round has the loss of these very ids, by a naive loop over
    transformers; among them special tokens, broken characters and answers without an end.
    """
    run = load(
        make_recipe,
        {"student.global_batch_size": 128},
        rounds=1,
        samples_per_prompt=8,
        temperature=3.0,
        rollout=rollout,
    )
    with at_work(run) as work:
        (record,) = train(work, 1)
    rows = rows_of(work, 1)
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    ends = set(ChatFormat(tokenizer=tokenizer).end_ids)
    ids = [row["answer_ids"].tolist() for row in rows]
    assert any(set(answer) & {0, 1} for answer in ids)  # special tokens that end nothing
    again = [tokenizer(tokenizer.decode(a), add_special_tokens=False)["input_ids"] for a in ids]
    assert sum(one != other for one, other in zip(ids, again, strict=True)) > len(ids) / 2
    reasons = {row["finish_reason"] for row in rows}
    assert reasons == {"stop", "length"}
    for row in rows:
        assert not set(row["answer_ids"][:-1]) & ends
        assert (row["answer_ids"][-1] in ends) == (row["finish_reason"] == "stop")
        assert row["finish_reason"] == "stop" or len(row["answer_ids"]) == NEW_TOKENS
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (student_folder, teacher_folder)
    ]
    total, count = 0.0, 0
    for row in rows:
        whole = torch.from_numpy(np.concatenate([row["prompt_ids"], row["answer_ids"]])).long()
        first = len(row["prompt_ids"]) - 1
        with torch.no_grad():
            log_q_NV, log_p_NV = (
                torch.log_softmax(m(whole[None]).logits[0, first:-1, :VOCABULARY], -1)
                for m in models
            )
        total += float((log_q_NV.exp() * (log_q_NV - log_p_NV)).sum())
        count += len(log_q_NV)
    # The teacher's states travel as bfloat16.
    assert record.kd == pytest.approx(total / count, rel=2e-3)
    assert record.answer_tokens == count


def test_mixes(make_recipe: Callable[..., Path]) -> None:
    """Half of the prompts keep the data's answers, and half as many answers are replayed; rewards
    become advantages of the sampled answers alone.
    """
    path = make_recipe().parent / "reward.py"
    path.write_text("def length(prompt, answer, label):\n    return len(answer)\n")
    run = load(
        make_recipe,
        {"student.num_ranks": 1},
        samples_per_prompt=4,
        fraction={"type": "constant", "value": 0.5},
        replay={"rounds": 1, "ratio": 0.5},
        reward={"function": f"{path}:length"},
    )
    with at_work(run) as work:
        records = train(work, 2)
        requests = [RoundRequest.model_validate(work._request(number)) for number in (1, 2)]
        stage = StageRun(work.spec, SilentReporter())
        table = stage.tables()["train"]
        first, second = (round_examples(stage, table, request) for request in requests)
    assert [record.answers for record in records] == [32, 32]
    assert (len(first), len(second)) == (32 + 8, 32 + 8 + 16)
    data = {TokenExamples(table)[i].student.digest for i in range(len(table))}
    assert all(e.student.digest in data and not e.advantage for e in second.all[32:40])
    sampled = {e.student.digest for e in first.sampled}
    assert {e.student.digest for e in second.all[40:]} <= sampled
    rows = rows_of(work, 2)
    assert records[1].reward_mean == pytest.approx(np.mean([len(r["answer_text"]) for r in rows]))
    board = EventAccumulator(str(metrics_of(work).parent / "tensorboard")).Reload()
    plotted = [(event.step, event.value) for event in board.Scalars("round/reward")]
    assert plotted == [(r.last_step, pytest.approx(r.reward_mean)) for r in records]
    assert len(board.Scalars("round/heldout_reverse_kl")) == 2
    by_prompt: dict[int, list[float]] = {}
    for row, example in zip(rows, second.sampled, strict=True):
        by_prompt.setdefault(row["prompt"], []).append(example.advantage)
    assert len(by_prompt) == 8
    assert all(sum(worth) == pytest.approx(0, abs=1e-9) for worth in by_prompt.values())
    assert any(any(worth) for worth in by_prompt.values())


def test_how_it_is_run_does_not_matter(make_recipe: Callable[..., Path]) -> None:
    """Heads spread over the ranks, student and teacher that sleep between their turns, states of a
    step at a time, and several engines, give the rounds of a run without.
    """
    batches = {"type": "transformers", "dtype": "float32", "prompts_per_batch": 3}
    plain = load(make_recipe, {}, rollout=batches)
    with at_work(plain) as plain_work:
        expected = train(plain_work, 2)
    other = {
        "student.vocabulary_parallel": True,
        "student.sleep": True,
        "teacher.sleep": True,
        "teacher.forward_batches": 1,
        "storage.root": f"{plain.storage.root}-2",
        "storage.scratch": f"{plain.storage.scratch}-2",
    }
    shared = load(make_recipe, other, rollout=batches | {"num_engines": 3})
    with at_work(shared) as work:
        found = train(work, 2)
        pairs = list(zip(rows_of(work, 1), rows_of(plain_work, 1), strict=True))
    for row, same in pairs:
        assert row["prompt"] == same["prompt"]
        np.testing.assert_array_equal(row["answer_ids"], same["answer_ids"])
    for one, another in zip(found, expected, strict=True):
        assert one.kd == pytest.approx(another.kd, rel=1e-4)
        assert one.heldout == pytest.approx(another.heldout, rel=1e-4)
        assert one.answer_tokens == another.answer_tokens
        assert one.log_prob_difference is not None
        assert one.log_prob_difference["largest"] < 1e-4


@pytest.mark.slow  # the estimator itself: tests/numerics
def test_a_policy_gradient_on_what_the_engine_reports(make_recipe: Callable[..., Path]) -> None:
    """The sampled reverse KL by the engine's own log-probabilities: at its first step, where the
    ratio is 1, the mean of log q - log p over the samples.
    """
    divergence = {"loss.divergence": {"type": "sampled_reverse_kl"}}
    run = load(make_recipe, divergence | {"student.global_batch_size": 16}, rounds=1)
    with at_work(run) as work:
        (record,) = train(work, 1)
    exact = load(make_recipe, {"student.global_batch_size": 16}, rounds=1)
    with at_work(exact) as work:
        (whole,) = train(work, 1)
    # The same samples; over 350 tokens the estimate is near the KL over the whole vocabulary.
    assert record.answer_tokens == whole.answer_tokens > 350
    assert record.kd == pytest.approx(whole.kd, abs=5 * 2.5 / 350**0.5)


def test_rolling_out_ahead(make_recipe: Callable[..., Path]) -> None:
    """With a staleness of 1, a round is rolled out while the one before it trains, by weights that
    are one round old.
    """
    run = load(make_recipe, {}, rounds=4, max_staleness=1)
    with at_work(run) as work:
        work.roll_out(1)
        work.score(1)
        work.train(1)
        work._finish_rollouts(2)  # asked for before training
        assert work.find(ROLLOUTS, 2) is not None
        records = train(work, 4)[1:]
    assert [record.version for record in records] == [0, 1, 2]
    assert [record.staleness for record in records] == [1, 1, 1]


def test_a_teacher_that_knows_the_answer(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """Self-distillation with privileged context: the teacher's prompt has the answer in it, the
    student's has not, and both have the student's own tokens behind it.
    """
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Answer {{ answer }}. {% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    overrides = {
        "algorithm": {"type": "self_distillation", "update": "synchronized"},
        "teacher.model.path": str(student_folder),
        "teacher.chat_template.template": template,
    }
    with at_work(load(make_recipe, overrides, rounds=1)) as work:
        (record,) = train(work, 1)
        stage = StageRun(work.spec, SilentReporter())
        request = RoundRequest.model_validate(work._request(1))
        examples = round_examples(stage, stage.tables()["train"], request)
    assert record.kd > 0.01  # with the same context it would be 0
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    for example in examples.all:
        assert f"Answer {example.label}." in tokenizer.decode(example.teacher.prompt_ids_T)
        assert "Answer" not in tokenizer.decode(example.student.prompt_ids_T)
        np.testing.assert_array_equal(example.student.target_ids_N, example.teacher.target_ids_N)


def test_rounds_that_are_done_stay_done(make_recipe: Callable[..., Path]) -> None:
    """A second run of the same goes on behind them, on another machine, too, which has nothing but
    the store; a lost checkpoint is trained again.
    """
    run = load(make_recipe, {"storage.checkpoints": "store"}, rounds=3)
    with at_work(run) as work:
        train(work, 2)
        written = {p: p.stat().st_mtime_ns for p in Path(run.storage.root).rglob("*.parquet")}
    Path(run.storage.scratch).rename(f"{run.storage.scratch}-lost")
    with at_work(run) as work:
        assert work.is_trained(1)
        assert work.is_trained(2)
        assert not work.is_trained(3)
        work.roll_out(3)
        assert work.record(work.train(3)).version == 2
        assert {p: p.stat().st_mtime_ns for p in written} == written
        assert read_metrics(metrics_of(work))[0]["step"] == 1
    for checkpoint in (metrics_of(work).parent.parent / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(f"lost-{checkpoint.name}"))
    shutil.rmtree(Path(run.storage.root) / "checkpoints")
    with at_work(run) as work:
        assert not work.is_trained(1)


def test_the_best_round_is_the_result(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """By what rounds measure on held-out samples, also of a run that was ended in between; it is
    the student of a run that ended with that round.
    """
    steady = {"student.lr": 0.5, "student.lr_schedule": "constant", "student.warmup_fraction": 0.0}
    best = steady | {"eval.keep_best": "reverse_kl"}
    run = load(make_recipe, best, rounds=4, checkpoint_rounds=4)
    with at_work(run) as work:
        records = train(work, 2)
    with at_work(run) as work:
        for number in (3, 4):
            work.roll_out(number)
            work.score(number)
            records.append(work.record(work.train(number)))
        kept = work.export()
    found = [record.heldout["reverse_kl"] for record in records if record.heldout is not None]
    least = int(np.argmin(found))
    assert least < 3, "the last round is not the best one"
    assert open_store(run).manifest(kept.kind, kept.digest).info["kept_step"] == (
        records[least].last_step
    )
    elsewhere = {f"storage.{name}": str(tmp_path / f"other-{name}") for name in ("root", "scratch")}
    with at_work(load(make_recipe, steady | elsewhere, rounds=least + 1)) as work:
        train(work, least + 1)
        shorter = work.export()
    weights, expected = (
        load_file(Path(ref.uri) / "model/model.safetensors") for ref in (kept, shorter)
    )
    assert all(weights[name].equal(expected[name]) for name in expected)


def kill(group: WorkerGroup | None) -> None:
    assert isinstance(group, RankGroup)
    group._ranks[0].process.signal(signal.SIGKILL)


def test_what_a_dead_trainer_had_not_saved_is_trained_again(
    make_recipe: Callable[..., Path],
) -> None:
    """Without a checkpoint since the beginning; the third round is then that of a run without an
    accident.
    """
    run = load(make_recipe, {}, rounds=3, checkpoint_rounds=5)
    where = {f"storage.{name}": f"{run.storage.root}-{name}" for name in ("root", "scratch")}
    with at_work(run) as work:
        expected = train(work, 3)
    with at_work(load(make_recipe, where, rounds=3, checkpoint_rounds=5)) as work:
        train(work, 2)
        kill(work._processes._trainer)
        with pytest.raises(WorkerError, match="SIGKILL"):
            work.roll_out(3)
        work.roll_out(3)
        work.score(3)
        found = work.record(work.train(3))
        steps = [r["step"] for r in read_metrics(metrics_of(work))]
    assert found.kd == expected[2].kd
    assert found.heldout == expected[2].heldout
    assert steps == list(range(1, 7))


@pytest.mark.parametrize("rollout", ENGINES, ids=["transformers", "sglang"])
def test_an_engine_killed_at_work_is_asked_again(
    make_recipe: Callable[..., Path], rollout: dict[str, Any]
) -> None:
    """Its answers are then those of a run without an accident."""
    settings: dict[str, Any] = {"max_staleness": 1, "rollout": rollout}
    run = load(make_recipe, {"student.num_ranks": 1}, **settings)
    with at_work(run) as work:
        work._begin_rollout(1)
        kill(work._processes._rollout)
        with pytest.raises(WorkerError, match="SIGKILL"):
            work.roll_out(1)
        assert work.roll_out(1).counts["answers"] == 16
    other = {f"storage.{name}": f"{run.storage.root}-{name}" for name in ("root", "scratch")}
    with at_work(load(make_recipe, {"student.num_ranks": 1} | other, **settings)) as undisturbed:
        undisturbed.roll_out(1)
    for one, another in zip(rows_of(work, 1), rows_of(undisturbed, 1), strict=True):
        np.testing.assert_array_equal(one["answer_ids"], another["answer_ids"])


def test_a_reward_that_cannot_be_had_ends_the_round(make_recipe: Callable[..., Path]) -> None:
    path = make_recipe().parent / "reward.py"
    path.write_text("def broken(prompt, answer, label):\n    return 'good'\n")
    reward = {"function": f"{path}:broken"}
    run = load(make_recipe, {"student.num_ranks": 1}, reward=reward)
    with at_work(run) as work, pytest.raises(Exception, match="gave 'good' for the answer"):
        work.roll_out(1)
