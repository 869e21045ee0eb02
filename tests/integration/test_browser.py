"""Reports and comparisons as Chromium shows them: on a phone and a desk, in light and dark."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.load import load_run
from configs.schema.run import RunConfig
from tasks.rounds.rounds_at_work import RoundsAtWork
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages, record_stages
from tests.browser import Browser, Shown, colored_share, contrast, program, rgb, running_browser
from tests.command import kdflow
from tests.conftest import run_inline

pytestmark = pytest.mark.ranks

READABLE = 4.5  # what the guidelines want of text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def browser(place: Path) -> Iterator[Browser]:
    if program() is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with running_browser(place / "profile") as running:
        yield running


@pytest.fixture
def pages(make_recipe: Callable[..., Path], place: Path) -> dict[str, Path]:
    """A run's report, one of rounds, and the comparison of two runs, made once."""
    places = {f"storage.{part}": str(place / part) for part in ("root", "scratch")}
    rounds = {"rounds": 2, "prompts_per_round": 8, "max_new_tokens": 8}
    chosen = {
        "short": {"student.max_steps": 3, "eval.every_steps": 1},
        "long": {"student.max_steps": 6},
        "rounds": {
            "mode": "onpolicy",
            "student.max_steps": None,
            "on_policy": rounds | {"rollout": {"type": "transformers"}},
        },
    }
    found = {}
    for name, fields in chosen.items():
        run = load_run(str(make_recipe()), places | {"name": name} | fields)
        plan = plan_stages(run)
        record_stages(run, plan)
        if not (place / "compared.html").exists():
            if run.on_policy is not None:
                make_rounds(run, run.on_policy.rounds)
            run_inline(run, until="report", launched=["train"])
        folder = place / "root/artifacts" / "report" / plan["report"].digest
        (found[name],) = folder.glob("*.html")
    found["compared"] = place / "compared.html"
    if not found["compared"].exists():
        options = ["--root", str(place / "root"), "--scratch", str(place / "scratch")]
        kdflow("compare", "short", "long", *options, "--output", str(found["compared"]))
    return found


def make_rounds(run: RunConfig, count: int) -> None:
    """The student of an on-policy run."""
    done = run_inline(run, until="extract")
    spec = stage_spec(plan_stages(run)["train"], run, done)
    with RoundsAtWork(spec, logging.getLogger("test")) as work:
        for number in range(1, count + 1):
            work.roll_out(number)
            work.score(number)
            work.train(number)
        work.export()


@pytest.mark.parametrize("page", ["short", "rounds", "compared"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_readable(
    browser: Browser, pages: dict[str, Path], page: str, width: int, scheme: str
) -> None:
    """Nothing is asked for, nothing fails, nothing is cut off, and there is something to see."""
    shown = browser.show(pages[page], width=width, scheme=scheme)
    assert shown.asked == [pages[page].as_uri()]
    assert shown.errors == []
    assert shown.scroll_width <= shown.width == width, "only tables scroll sideways"
    assert_colors(shown, scheme)
    assert len(shown.figures) >= 3
    for box in shown.figures:
        assert 0 <= box[0] < box[2] <= width
        assert colored_share(shown.picture.crop([round(edge) for edge in box])) > 4e-3, "no curve"


def assert_colors(shown: Shown, scheme: str) -> None:
    """As somebody wants it who has chosen a scheme, and as eyes need it."""
    assert (sum(rgb(shown.background)) / 3 < 0.5) == (scheme == "dark")
    corner = shown.picture.getpixel((2, 2))
    assert corner == tuple(round(255 * part) for part in rgb(shown.background))
    faint = [t for t in shown.texts if contrast(t["ink"], t["ground"]) < READABLE]
    assert faint == []


def test_a_page_holds_what_it_is_about(browser: Browser, pages: dict[str, Path]) -> None:
    """What was measured, as it stands there for people."""
    place = pages["compared"].parent
    options = ["--root", str(place / "root"), "--scratch", str(place / "scratch")]
    lines = [json.loads(line) for line in kdflow("history", *options, "--json").splitlines()]
    scores = {line["run"].partition("@")[0].partition("-")[0]: line["scores"] for line in lines}
    texts = {
        name: browser.show(path, width=1280, scheme="light").text for name, path in pages.items()
    }
    for name in ("short", "long", "rounds"):
        kl = f"{scores[name]['forward_kl']:.4f}"
        assert kl in texts[name]
        assert (kl in texts["compared"]) == (name != "rounds")
    assert "Rounds" in texts["rounds"]
    assert "Rounds" not in texts["short"]
    assert "student.max_steps\t3\t6" in texts["compared"]
