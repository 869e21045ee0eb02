"""The tokenize stage: sources, blending, split, and what is dropped."""

import json
from collections import Counter
from pathlib import Path

import datasets
import fsspec
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from configs.schema.data import DataConfig
from kdflow_core.contracts import Example
from kdflow_core.data.chat import ChatFormat
from kdflow_core.data.rendering import Renderer
from kdflow_core.data.tokenization import Split, Tally, ViewReader, blend_counts, tokenize
from kdflow_core.errors import DataError
from storage.data_files import DataFiles
from tests.conftest import SilentReporter

ANSWER = {"role": "assistant", "content": "y"}
ROWS = [{"prompt": f"number {i}", "completion": f"answer {i}", "answer": str(i)} for i in range(60)]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def renderer(teacher_folder: Path) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    return Renderer(ChatFormat(tokenizer=tokenizer), supervise="all")


def run(
    renderer: Renderer,
    config: dict[str, object],
    *,
    teacher: Renderer | None = None,
    cores: int = 1,
) -> tuple[list[tuple[Split, Example]], Tally]:
    tally = Tally()
    examples = tokenize(
        config=DataConfig.model_validate_json(json.dumps({"heldout_fraction": 0.3} | config)),
        seed=0,
        files=DataFiles(),
        readers={
            "student": ViewReader(renderer=renderer, context_length=256),
            "teacher": ViewReader(renderer=teacher or renderer, context_length=256),
        },
        reporter=SilentReporter(),
        tally=tally,
        cores=cores,
    )
    return [(split, example) for split, example, _ in examples], tally


def files(path: Path | str, **fields: object) -> dict[str, object]:
    return {"type": "files", "path": str(path)} | fields


def test_the_number_of_cores_does_not_matter(tmp_path: Path, renderer: Renderer) -> None:
    """Examples, their order, and what is counted."""
    rows: list[object] = [
        {"prompt": f"number {i}", "completion": f"answer {i}"} for i in range(1400)
    ]
    rows[700] = "no JSON"
    rows[1200] = {"prompt": "long", "completion": "answer " * 300}
    rows[1300] = {"messages": [{"role": "user", "content": "x", "name": "Ann"}, ANSWER]}
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[:50])
    config: dict[str, object] = {
        "sources": [files(tmp_path / "a.jsonl"), files(tmp_path / "b.jsonl")],
        "max_malformed_fraction": 0.1,
        "max_samples": 1300,
    }
    (one, tally), (many, other) = (run(renderer, config, cores=cores) for cores in (1, 3))
    assert [(s, e.source, e.teacher.digest) for s, e in one] == [
        (s, e.source, e.teacher.digest) for s, e in many
    ]
    assert tally == other
    assert {reason for found in tally.dropped.values() for reason in found} == {
        "malformed",
        "too_long",
    }
    assert tally.ignored == {side: Counter(name=1) for side in ("student", "teacher")}


def test_jsonl_parquet_arrow_and_saved_folders_read_alike(
    tmp_path: Path, renderer: Renderer
) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/kdflow-test/d.jsonl", (tmp_path / "d.jsonl").read_bytes())
    sources = [
        files(tmp_path / "d.jsonl"),
        files(tmp_path / "d.parquet"),
        files(arrow),
        files(tmp_path / "*.jsonl", format="jsonl"),
        files("memory://kdflow-test/d.jsonl"),
        {"type": "save_to_disk", "path": str(tmp_path / "saved")},
    ]
    seen = []
    for source in sources:
        examples, tally = run(renderer, {"sources": [source]})
        assert not tally.dropped
        seen.append([(split, e.teacher.digest, e.label) for split, e in examples])
    assert len(seen[0]) == len(ROWS)
    assert all(other == seen[0] for other in seen)


def test_data_sets_by_name_are_loaded_through_datasets(tmp_path: Path, renderer: Renderer) -> None:
    """`datasets` takes a folder for a name: the same call as for the hub, without the hub."""
    (tmp_path / "org/name/sub").mkdir(parents=True)
    write_jsonl(tmp_path / "org/name/sub/train.jsonl", list(ROWS))
    write_jsonl(tmp_path / "org/name/sub/test.jsonl", list(ROWS[:20]))
    source = {"type": "hub", "path": str(tmp_path / "org/name"), "split": "test", "name": "named"}
    (tmp_path / "org/name/README.md").write_text(
        "---\nconfigs:\n- config_name: sub\n  data_files:\n"
        "  - {split: train, path: sub/train.jsonl}\n  - {split: test, path: sub/test.jsonl}\n---\n"
    )
    examples, _ = run(renderer, {"sources": [source | {"subset": "sub"}]})
    assert len(examples) == 20
    with pytest.raises(DataError, match=r"cannot read data source .*nope"):
        run(renderer, {"sources": [source | {"subset": "nope"}]})


def test_split_goes_by_content_and_not_by_position(tmp_path: Path, renderer: Renderer) -> None:
    def sides(rows: list[object]) -> dict[bytes, Split]:
        examples, _ = run(renderer, {"sources": [files(write_jsonl(tmp_path / "d.jsonl", rows))]})
        return {e.teacher.digest: split for split, e in examples}

    before = sides(list(ROWS))
    after = sides([{"prompt": "new", "completion": "sample"}, *reversed(ROWS)])
    assert before.items() <= after.items()
    share = Counter(before.values())["heldout"] / len(before)
    assert 0.1 < share < 0.5


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path, renderer: Renderer) -> None:
    rows = [
        *ROWS,
        "{broken",
        '"text"',
        "",
        {"prompt": "x", "completion": ""},
        {"prompt": "x " * 300, "completion": "y"},
        {"other": 1},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    examples, tally = run(renderer, {"sources": [files(path)], "max_malformed_fraction": 0.1})
    assert len(examples) == len(ROWS)
    assert tally.read["d.jsonl"] == len(rows)
    assert tally.dropped["d.jsonl"] == {
        "malformed": 2,
        "blank_line": 1,
        "empty": 1,
        "too_long": 1,
        "missing_column": 1,
    }


def test_samples_that_a_template_refuses_fall_under_the_limit(
    tmp_path: Path, teacher_folder: Path
) -> None:
    """20 of 60 do not vanish without a word; the first is shown, all are counted by reason."""
    template = (
        "{% for m in messages %}{% if '7' in m['content'] %}{{ raise_exception('no sevens') }}"
        "{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    chat = ChatFormat(tokenizer=tokenizer, template=template)
    config = {"sources": [files(write_jsonl(tmp_path / "d.jsonl", list(ROWS)))]}
    renderer = Renderer(chat, supervise="all")
    with pytest.raises(DataError, match=r"6 of 60 .*\(template_error: 6\).*no sevens"):
        run(renderer, config)
    examples, tally = run(renderer, config | {"max_malformed_fraction": 0.2})
    assert len(examples) == 54
    assert tally.dropped["d.jsonl"] == {"template_error": 6}


def test_a_text_that_cannot_fit_is_not_rendered(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of tens of megabytes costs its length, not a hundred times that in tokens."""
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "x " * 10**6, "completion": "y"}, *ROWS])
    seen = []
    ids = ChatFormat.ids
    monkeypatch.setattr(ChatFormat, "ids", lambda c, t: seen.append(len(t)) or ids(c, t))
    _, tally = run(renderer, {"sources": [files(path)]})
    assert tally.dropped["d.jsonl"] == {"too_long": 1}
    assert max(seen) < 1000


def test_copies_of_the_last_sample_taken_are_not_all_let_through(
    tmp_path: Path, renderer: Renderer
) -> None:
    rows = [row for row in ROWS[:6] for _ in range(10)]
    for count in (12, 25, 60):
        config = {"sources": [files(write_jsonl(tmp_path / "d.jsonl", rows), max_samples=count)]}
        examples, _ = run(renderer, config | {"heldout_fraction": 0.5})
        assert len(examples) == count


def test_a_prompt_with_several_answers_is_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    rows = [
        {"prompt": f"number {k}", "completion": f"answer {n}"} for k in range(40) for n in range(4)
    ]
    examples, _ = run(renderer, {"sources": [files(write_jsonl(tmp_path / "d.jsonl", rows))]})
    sides: dict[bytes, set[Split]] = {}
    for split, example in examples:
        sides.setdefault(example.student.prompt_ids_T.tobytes(), set()).add(split)
    assert len(sides) == 40
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {"train", "heldout"}


def test_a_column_that_kdflow_does_not_know_cannot_be_mapped() -> None:
    source = {"type": "files", "path": "d.jsonl", "columns": {"promt": "question"}}
    with pytest.raises(ValidationError, match="prompt"):
        DataConfig.model_validate_json(json.dumps({"sources": [source]}))


def test_too_many_malformed_lines_are_refused_with_the_first(
    tmp_path: Path, renderer: Renderer
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*ROWS[:3], "{broken"])
    with pytest.raises(DataError, match=r"1 of 4 samples .*d\.jsonl line 4 is not JSON") as caught:
        run(renderer, {"sources": [files(path)]})
    assert "max_malformed_fraction" in str(caught.value)


def test_a_wrong_column_is_refused_by_name(tmp_path: Path, renderer: Renderer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "a", "response": "b"}])
    with pytest.raises(DataError, match=r"\['question', 'response'\] fit none of the layouts"):
        run(renderer, {"sources": [files(path)]})


def test_a_missing_file_is_refused_by_name(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError, match=r"cannot read data source .*none\.jsonl"):
        run(renderer, {"sources": [files(tmp_path / "none.jsonl")]})


def test_an_empty_file_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError, match="no sample is left of 0 read"):
        run(renderer, {"sources": [files(write_jsonl(tmp_path / "d.jsonl", []))]})


def test_an_empty_split_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS[:3])
    with pytest.raises(DataError, match=r"heldout split is empty .*heldout_fraction \(now 1e-06"):
        run(renderer, {"sources": [files(path)], "heldout_fraction": 1e-6})


def test_a_dict_of_splits_asks_for_one(tmp_path: Path, renderer: Renderer) -> None:
    split = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    split.save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"several splits .*name one: .*d/train"):
        run(renderer, {"sources": [{"type": "save_to_disk", "path": str(tmp_path / "d")}]})


def test_blending_takes_the_shares(tmp_path: Path, renderer: Renderer) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", list(ROWS))
    b = write_jsonl(
        tmp_path / "b.jsonl", [{"prompt": f"b {i}", "completion": "c"} for i in range(30)]
    )
    config = {"sources": [files(a, weight=1.0), files(b, weight=2.0)], "max_samples": 30}
    examples, _ = run(renderer, config)
    assert Counter(e.source for _, e in examples) == {"a.jsonl": 10, "b.jsonl": 20}


def test_max_samples_of_a_source(tmp_path: Path, renderer: Renderer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", list(ROWS))
    examples, _ = run(renderer, {"sources": [files(path, max_samples=25)]})
    assert len(examples) == 25


@pytest.mark.parametrize(
    ("available", "weights", "limit", "expected"),
    [
        ([100, 10], [1.0, 1.0], None, [10, 10]),
        ([100, 10], [9.0, 1.0], None, [90, 10]),
        ([100, 100], [2.0, 1.0], 10, [7, 3]),
        ([30, 10], [None, None], 8, [6, 2]),
        ([0, 0], [None, None], 8, [0, 0]),
        ([5, 7], [None, None], 100, [5, 7]),
    ],
)
def test_blend_counts(
    available: list[int], weights: list[float | None], limit: int | None, expected: list[int]
) -> None:
    assert blend_counts(available=available, weights=weights, max_samples=limit) == expected


def test_templates_may_differ_around_the_same_answer(
    tmp_path: Path, renderer: Renderer, teacher_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    template = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    bare = Renderer(ChatFormat(tokenizer=tokenizer, template=template), supervise="all")
    path = write_jsonl(tmp_path / "d.jsonl", list(ROWS))
    examples, tally = run(renderer, {"sources": [files(path)]}, teacher=bare)
    assert not tally.dropped
    assert len(examples[0][1].teacher.ids_T) < len(examples[0][1].student.ids_T)
    other_end = template.replace("<|im_end|>", "<|endoftext|>")
    other = Renderer(ChatFormat(tokenizer=tokenizer, template=other_end), supervise="all")
    with pytest.raises(DataError, match="supervise different tokens"):
        run(renderer, {"sources": [files(path)]}, teacher=other)


@pytest.mark.parametrize(
    "limits",
    [
        ({"max_samples": 25}, {}, 40),
        ({"max_samples": 7}, {"max_samples": 100}, None),
        ({"weight": 1.0}, {"weight": 2.0}, 30),
        ({}, {}, 33),
        ({}, {}, 1000),
    ],
)
def test_few_samples_are_the_same_whether_a_source_is_read_once_or_twice(
    tmp_path: Path,
    renderer: Renderer,
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[dict[str, object], dict[str, object], int | None],
) -> None:
    """With equal samples at the limit, and lines that cannot be used; read once where few."""
    equal = [{"prompt": "the same", "completion": "again"}] * 20
    rows: list[object] = [*ROWS[:30], *equal, "no JSON", *ROWS[30:]]
    first = files(write_jsonl(tmp_path / "a.jsonl", rows), **limits[0])
    second = files(write_jsonl(tmp_path / "b.jsonl", ROWS), **limits[1])
    config: dict[str, object] = {"sources": [first, second], "max_malformed_fraction": 0.5}
    if limits[2] is not None:
        config["max_samples"] = limits[2]
    read: list[str] = []
    lines = DataFiles.lines
    monkeypatch.setattr(DataFiles, "lines", lambda own, path: read.append(path) or lines(own, path))
    once, counted = run(renderer, config)
    assert len(read) == 2
    monkeypatch.setattr("kdflow_core.data.tokenization.MOST_HELD", 0)
    twice, counted_again = run(renderer, config)
    assert len(read) == 2 + 4
    assert [(s, e.student.ids_T.tolist()) for s, e in once] == [
        (s, e.student.ids_T.tolist()) for s, e in twice
    ]
    assert counted == counted_again


def test_a_held_out_source_is_never_trained_on(tmp_path: Path, renderer: Renderer) -> None:
    """Nor are its prompts, wherever they stand; it has no part in the blend, and its own limit."""
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    shared = [{"prompt": row["prompt"], "completion": "other"} for row in ROWS[:5]]
    others = [{"prompt": f"other {i}", "completion": f"{i}"} for i in range(20)]
    test = write_jsonl(tmp_path / "test.jsonl", [*shared, *others])
    for limits in ({}, {"max_samples": 40}, {"max_samples": 30_000}):
        sources = [files(train), files(test, heldout=True)]
        found, tally = run(renderer, {"sources": sources, "heldout_fraction": 0} | limits)
        by = Counter((split, example.source) for split, example in found)
        taken = min(limits.get("max_samples", 60), 60)
        assert by["heldout", "test.jsonl"] == 25
        assert by["train", "train.jsonl"] + by["heldout", "train.jsonl"] == taken
        assert by["heldout", "train.jsonl"] == tally.withheld["train.jsonl"] <= 5
        assert ("train", "test.jsonl") not in by
        if taken == 60:
            assert tally.withheld["train.jsonl"] == 5
    few = [files(train, max_samples=10), files(test, heldout=True, max_samples=7)]
    found, _ = run(renderer, {"sources": few, "heldout_fraction": 0})
    assert Counter(example.source for _, example in found) == {"train.jsonl": 10, "test.jsonl": 7}


def test_held_out_prompts_that_are_nearly_trained_on_are_counted(
    tmp_path: Path, renderer: Renderer
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    prompts = [str(row["prompt"]) for row in ROWS]
    likes = [prompts[0].upper(), prompts[1] + " ??", f"  {prompts[2]}", prompts[3], "another one"]
    held = [{"prompt": prompt, "completion": "other"} for prompt in likes]
    test = write_jsonl(tmp_path / "test.jsonl", held)
    sources = [files(train), files(test, heldout=True)]
    _, tally = run(renderer, {"sources": sources, "heldout_fraction": 0})
    assert +tally.withheld == {"train.jsonl": 1}, "the very prompt is trained on nowhere"
    assert tally.overlap.count() == 3
    _, tally = run(renderer, {"sources": [files(train)], "heldout_fraction": 0.3})
    assert tally.overlap.count() == 0


def test_held_out_sources_that_do_not_fit(tmp_path: Path, renderer: Renderer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    both = [files(path, name="a"), files(path, name="b", heldout=True)]
    for config, text in (
        ({"sources": [files(path, heldout=True)]}, "all sources are `heldout`"),
        ({"sources": [files(path)], "heldout_fraction": 0}, "nothing would be left"),
        ({"sources": [both[0], both[1] | {"weight": 1.0}]}, "no part of the blend"),
    ):
        with pytest.raises(ValidationError, match=text):
            run(renderer, config)
    with pytest.raises(DataError, match=r"train split is empty .*for their prompts: {'a': 60}"):
        run(renderer, {"sources": both, "heldout_fraction": 0})
    weighted = [both[0] | {"weight": 1.0}, files(path, name="c", weight=2.0), both[1]]
    with pytest.raises(DataError, match="train split is empty"):
        run(renderer, {"sources": weighted, "heldout_fraction": 0})
