"""`kdflow history` and `kdflow compare` over finished runs."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run
from storage.runs import RunRecord
from tasks.checks.anew import forget_from
from tasks.stages.identity import find
from tasks.stages.planning import plan_stages, record_stages
from tests.command import kdflow
from tests.conftest import run_inline

pytestmark = pytest.mark.ranks


class Links(HTMLParser):
    """What a page would ask others for, and its tables' cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.asked.append(f"{tag} {value}")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture
def runs(make_recipe: Callable[..., Path], compared: Path) -> list[str]:
    """Ids of two finished runs, of which the second trains twice as long."""
    ids = []
    for name, steps in (("short", 3), ("long", 6)):
        places = {f"storage.{part}": str(compared / part) for part in ("root", "scratch")}
        run = load_run(str(make_recipe(max_steps=steps)), places | {"name": name})
        plan = plan_stages(run)
        record_stages(run, plan)
        run_inline(run, until="report", launched=["train"])
        artifacts = {stage: f"{i.kind}/{i.digest}" for stage, i in plan.items()}
        ids.append(RunRecord(name=name, created_at="", artifacts=artifacts).id)
    return ids


def test_history_lists_finished_runs_with_their_scores(runs: list[str], compared: Path) -> None:
    places = ["--root", str(compared / "root"), "--scratch", str(compared / "scratch")]
    table = kdflow("history", *places)
    assert all(run in table for run in runs)
    (line,) = kdflow("history", *places, "--name", "long", "--json").splitlines()
    found = json.loads(line)
    assert found["run"] == runs[1]
    low, high = found["scores"]["intervals"]["forward_kl"]
    assert low < found["scores"]["forward_kl"] < high
    assert (Path(found["student"]) / "model/config.json").is_file()


def test_runs_side_by_side(runs: list[str], compared: Path, tmp_path: Path) -> None:
    places = ["--root", str(compared / "root"), "--scratch", str(compared / "scratch")]
    page_file = tmp_path / "page.html"
    said = kdflow("compare", "short", runs[1], *places, "--output", str(page_file))
    assert str(page_file) in said
    page = page_file.read_text()
    scores = [
        json.loads(kdflow("history", *places, "--name", name, "--json"))["scores"]
        for name in ("short", "long")
    ]
    difference = scores[1]["forward_kl"] - scores[0]["forward_kl"]
    assert difference < 0
    assert f"<strong>{difference:+.4f}</strong>" in page, "twice as long is surely better"
    assert re.search(r"<code>student.max_steps</code></td><td>3</td><td>6</td>", page)
    assert "student.lr<" not in page, "what is alike is left out"
    assert page.count("<svg") >= 3
    assert Links(page).asked == []
    assert page_file.stat().st_size < 5e6


@pytest.mark.parametrize(
    ("names", "message"),
    [(["short", "nothing"], "no finished run 'nothing'"), (["short", "short"], "two runs or more")],
)
def test_what_cannot_be_compared(
    runs: list[str], compared: Path, names: list[str], message: str
) -> None:
    del runs
    places = ["--root", str(compared / "root"), "--scratch", str(compared / "scratch")]
    assert message in kdflow("compare", *names, *places, code=1)


def test_a_report_is_found_by_its_run(runs: list[str], compared: Path) -> None:
    places = ["--root", str(compared / "root"), "--scratch", str(compared / "scratch")]
    (path,) = kdflow("report", runs[0], *places).split()
    assert "short" in Path(path).read_text()


def test_stages_are_made_anew_from_one_on(
    runs: list[str], compared: Path, make_recipe: Callable[..., Path]
) -> None:
    """Those before it come from cache; and the result is what it was."""
    del runs
    places = {f"storage.{part}": str(compared / part) for part in ("root", "scratch")}
    run = load_run(str(make_recipe(max_steps=3)), places | {"name": "short"})
    stages = plan_stages(run)
    before = {name: find(run, identity) for name, identity in stages.items()}
    weights = Path(before["train"].uri) / "model/model.safetensors"  # type: ignore[union-attr]
    content = weights.read_bytes()
    removed = forget_from(run, stages, "train")
    assert [name.partition("/")[0] for name in removed] == ["student", "evaluation", "report"]
    assert find(run, stages["extract"]) == before["extract"]
    assert not weights.exists()
    run_inline(run, until="report", launched=["train"])
    assert weights.read_bytes() == content
    with pytest.raises(ConfigError, match="no stage 'trian'; it has tokenize, extract, train"):
        forget_from(run, stages, "trian")
