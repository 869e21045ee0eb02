"""`kdflow init` writes recipes that load, with what is here by its whole path."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.load import load_run
from flows.cli import app
from tests.command import kdflow


def test_it_asks_for_what_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    asked = f"{teacher_folder}\nacme/Small-Model 0.5B\nown.jsonl\n"
    result = CliRunner().invoke(app, ["init", "--gpus", "4"], input=asked)
    assert result.exit_code == 0, result.output
    assert "kdflow run my.yaml" in result.output
    run = load_run("my.yaml", {})
    assert run.name == "small-model-0.5b"
    assert run.teacher.model.path == str(teacher_folder)  # type: ignore[union-attr]
    assert run.teacher.type == "sglang"
    assert run.student.model.path == "acme/Small-Model 0.5B"  # type: ignore[union-attr]
    assert run.data.sources[0].path == str(tmp_path / "own.jsonl")
    assert run.student.num_ranks == run.teacher.num_ranks == 4
    assert run.student.global_batch_size % 4 == 0


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ("HuggingFaceTB/smoltalk", "hub"),
        ("s3://bucket/part-*.parquet", "files"),
        ("own.jsonl.bz2", "files"),
        ("saved", "save_to_disk"),
    ],
)
def test_data_is_told_by_its_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, source: str
) -> None:
    """Without a GPU, for a CPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").touch()
    models = ["--teacher", "a/teacher", "--student", "a/student"]
    kdflow("init", "out.yaml", *models, "--data", data, "--gpus", "0")
    run = load_run("out.yaml", {})
    assert run.data.sources[0].type == source
    assert run.teacher.type == "transformers"
    assert run.teacher.dtype == run.student.compute_dtype == "float32"


def test_nothing_is_overwritten_and_nothing_half_done_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    models = ["--teacher", "a/teacher", "--student", "a/student"]
    said = kdflow("init", "out.yaml", *models, "--data", "folder", code=1)
    assert "name its files, as folder/*.jsonl" in said
    assert not (tmp_path / "out.yaml").exists()
    (tmp_path / "out.yaml").write_text("mine")
    assert "is there already" in kdflow("init", "out.yaml", *models, "--data", "x/y", code=1)
    assert (tmp_path / "out.yaml").read_text() == "mine"
