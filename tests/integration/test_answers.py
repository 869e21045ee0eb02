"""Answers that a model writes in place of the data's, and training on them."""

import json
import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.contracts import Example
from kdflow_core.data.chat import ChatFormat
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.checks.engine_check import check_engines
from tasks.execution.launch import launch_stage
from tasks.jobs.stored import TokenExamples
from tasks.presentation.tracking import read_metrics
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.conftest import VOCABULARY, run_inline

pytestmark = pytest.mark.ranks
LOG = logging.getLogger("test")
NEW_TOKENS = 12
ENGINES = {
    "transformers": {"type": "transformers", "dtype": "float32", "prompts_per_batch": 3},
    "sglang": {"type": "sglang", "dtype": "float32", "max_running": 16},
}


def generate(run: RunConfig) -> dict[str, ArtifactRef]:
    """The stages through `generate`, which has two ranks."""
    done = run_inline(run, until="tokenize")
    identity = plan_stages(run)["generate"]
    return done | {"answers": launch_stage(stage_spec(identity, run, done), LOG)}


def examples(ref: ArtifactRef) -> list[Example]:
    table = TokenExamples(TokenTable(Path(ref.uri) / "train.arrow"))
    return [table[i] for i in range(len(table))]


def settings(**answers: Any) -> dict[str, Any]:
    config = {
        "max_new_tokens": NEW_TOKENS,
        "prompts_per_part": 24,
        "engine": ENGINES["transformers"],
    }
    return {"data.answers": config | answers}


@pytest.mark.parametrize(
    "engine",
    # What the engine itself writes: tests/contracts/test_rollout.
    ["transformers", pytest.param("sglang", marks=pytest.mark.slow)],
)
def test_the_teachers_greedy_answers(
    make_recipe: Callable[..., Path],
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    """They are those of transformers on the prompt alone; an answer that is cut has no end."""
    answers = settings(by="teacher", temperature=0.0, fraction=0.5, engine=ENGINES[engine])
    run = load_run(str(make_recipe(num_ranks=2)), answers)
    done = generate(run)
    monkeypatch.setattr(metadata, "version", lambda _: "0")
    check_engines(run, plan_stages(run))  # an engine that has done its part may be gone
    before, after = examples(done["tokens"]), examples(done["answers"])
    assert len(before) == len(after)
    changed = [
        (b, a) for b, a in zip(before, after, strict=True) if b.student.digest != a.student.digest
    ]
    assert 0.3 * len(before) < len(changed) < 0.7 * len(before)
    assert done["answers"].counts["answered"] == len(changed)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    ends = set(ChatFormat(tokenizer=AutoTokenizer.from_pretrained(teacher_folder)).end_ids)
    for old, new in changed[:10]:
        prompt = torch.tensor(old.teacher.prompt_ids_T).long()[None]
        answer = new.teacher.target_ids_N
        for token in answer:
            with torch.no_grad():
                logits_V = model(prompt).logits[0, -1, :VOCABULARY]
            assert logits_V[token] == pytest.approx(logits_V.max().item(), abs=1e-4)
            prompt = torch.cat([prompt, torch.tensor([[token]])], 1)
        assert len(answer) == NEW_TOKENS or answer[-1] in ends
        assert not set(answer[:-1].tolist()) & ends
        np.testing.assert_array_equal(new.student.target_ids_N, answer)
        np.testing.assert_array_equal(new.student.prompt_ids_T, old.student.prompt_ids_T)
        assert new.sampled_log_prob_N is None


def test_the_students_samples_and_a_policy_gradient_on_them(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """Their log-probabilities are those of the model that sampled them; the first step's estimate
    of the reverse KL is then log q - log p of these tokens, at a ratio of one.
    """
    overrides = settings(by="student", temperature=0.8) | {
        "loss.divergence": {"type": "sampled_reverse_kl", "temperature": 0.8},
        "loss.kd_ratio": 1.0,
    }
    run = load_run(str(make_recipe(num_ranks=2)), overrides)
    done = generate(run)
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    answered = examples(done["answers"])
    assert len({example.student.digest for example in answered}) > 0.9 * len(answered)
    for example in answered[:10]:
        assert example.sampled_log_prob_N is not None
        with torch.no_grad():
            logits_TV = model(torch.tensor(example.student.ids_T).long()[None]).logits[0]
        rows = example.student.target_positions_N - 1
        log_q_NV = torch.log_softmax(logits_TV[rows, :VOCABULARY] / 0.8, -1)
        expected_N = log_q_NV[
            torch.arange(len(rows)), torch.tensor(example.student.target_ids_N).long()
        ]
        np.testing.assert_allclose(example.sampled_log_prob_N, expected_N, rtol=1e-4, atol=1e-5)

    for stage in ("extract", "train"):
        identity = plan_stages(run)[stage]
        done |= {identity.output: launch_stage(stage_spec(identity, run, done), LOG)}
    records = read_metrics(Path(done["student"].uri) / "metrics.jsonl")
    assert records[0]["kd"] > 0.5  # two unrelated random models
    assert all(record["loss"] == pytest.approx(record["kd"]) for record in records)
    assert done["states"].counts["sequences"] > len(answered)


def test_a_stopped_generation_goes_on_with_its_parts(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Parts that are there are kept, and the result does not depend on who wrote which."""
    overrides = settings(by="student") | {"student.num_ranks": 2}
    run = load_run(str(make_recipe()), overrides)
    done = generate(run)
    whole = (Path(done["answers"].uri) / "train.arrow").read_bytes()
    parts = tmp_path / "scratch/answers" / done["answers"].digest / "parts"
    kept = keep_first_part(run, done, parts)
    (Path(done["answers"].uri) / "manifest.json").unlink()
    one = load_run(str(make_recipe()), overrides | {"student.num_ranks": 1})
    again = generate(one)["answers"]
    assert again.digest == done["answers"].digest
    # The first part was taken as it stood: its answers are not what the model writes.
    marked = examples(again)[: len(kept)]
    assert all((example.student.target_ids_N == 7).all() for example in marked)
    assert (Path(again.uri) / "train.arrow").read_bytes() != whole


def keep_first_part(run: RunConfig, done: dict[str, ArtifactRef], parts: Path) -> list[Example]:
    """Put a first part with answers of sevens where the stage looks for it."""
    from storage.digest import digest
    from storage.sealed import seal
    from storage.tokens import TokenWriter
    from tasks.jobs.stored import token_row

    parts.mkdir(parents=True)
    kept = examples(done["answers"])[:24]
    path = parts / f"train-000000-{digest(list(range(24)))[:8]}.arrow"
    with TokenWriter(path) as writer:
        for example in kept:
            row = token_row(example)
            ids_T = row["student_ids"].copy()
            ids_T[example.student.supervised_T] = 7
            writer.add(row | {"student_ids": ids_T})
    seal(path)
    return kept


@pytest.mark.parametrize(
    ("answers", "temperature"),
    [
        (None, 1.0),
        ({"by": "teacher"}, 1.0),
        ({"by": "student", "fraction": 0.5}, 1.0),
        ({"by": "student", "top_p": 0.9}, 1.0),
        ({"by": "student"}, 2.0),
    ],
)
def test_a_policy_gradient_without_its_samples_is_refused(
    make_recipe: Callable[..., Path], answers: dict[str, Any] | None, temperature: float
) -> None:
    divergence = {"type": "sampled_reverse_kl", "temperature": temperature}
    overrides = {"loss.divergence": divergence, "data.answers": answers}
    with pytest.raises(ValueError, match="learns from what the student has sampled"):
        load_run(str(make_recipe()), overrides)


@pytest.mark.parametrize("shard_rows", [1024, 32], ids=["rows copied", "shards taken over"])
def test_only_what_is_new_is_tokenized_answered_and_scored(
    make_recipe: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shard_rows: int,
) -> None:
    """More data, before the old and behind it: what a run with all of it from the start makes."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"prompt": f"{a} plus {b}?"} for a in range(8) for b in range(5)]
    rows.append(rows[12])  # one prompt twice: two answers
    files = {"b": rows[10:30], "a": rows[:10], "c": rows[30:]}
    source = {"type": "files", "path": str(folder / "*.jsonl"), "name": "rows"}
    overrides = settings(by="teacher", temperature=0.0) | {"data.sources": [source]}
    overrides |= {"storage.shard_rows": shard_rows, "storage.chunk_rows": 32}
    recipe = str(make_recipe())

    def made(root: str, names: str = "") -> dict[str, ArtifactRef]:
        for name in names:
            lines = (json.dumps(row) + "\n" for row in files[name])
            (folder / f"{name}.jsonl").write_text("".join(lines))
        places = {"storage.root": str(tmp_path / root), "storage.scratch": str(tmp_path / root)}
        run = load_run(recipe, overrides | places)
        done: dict[str, ArtifactRef] = {}
        for identity in plan_stages(run).values():
            spec = stage_spec(identity, run, done)
            done |= {identity.output: launch_stage(spec, LOG)}
            if identity.stage == "train":
                break
        return done

    caplog.set_level(logging.INFO)
    made("store", "b")
    assert "before" not in caplog.text
    assert "copied" not in caplog.text
    done = made("store", "ac")
    assert "of which 21 were tokenized before" in caplog.text
    assert f"20 of {len(rows)} answers are copied" in caplog.text
    if shard_rows == 1024:
        assert "the states of 20 of 40 sequences are copied" in caplog.text
    else:
        assert "shards are there already" in caplog.text
        assert "of them taken over from other runs of this teacher" in caplog.text
        hidden = Path(done["states"].uri) / "states.zarr/hidden/c"
        links = [path.stat().st_nlink for path in hidden.rglob("0") if path.is_file()]
        assert links.count(2) > 2
    whole = made("other")
    assert {output: ref.digest for output, ref in done.items()} == {
        output: ref.digest for output, ref in whole.items()
    }
    for output in ("tokens", "answers"):
        for split in ("train", "heldout"):
            mine, other = (Path(d[output].uri) / f"{split}.arrow" for d in (done, whole))
            assert mine.read_bytes() == other.read_bytes()
    weights, expected = (
        load_file(Path(d["student"].uri) / "model/model.safetensors") for d in (done, whole)
    )
    # The teacher's states have the last bits of the batch that they were computed in.
    for name, own in expected.items():
        torch.testing.assert_close(weights[name], own, rtol=1e-3, atol=1e-4)
