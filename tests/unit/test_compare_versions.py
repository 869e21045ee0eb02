"""What another release of SGLang changes of what kdflow uses: the installed one, altered."""

import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdflow_core.sglang_runtime.compare_versions import Release, main, used_names

SRT = "sglang/srt"


@pytest.fixture(scope="module")
def site() -> Path:
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def wheel_with(site: Path, target: Path, *changes: tuple[str, str, str]) -> Path:
    """The installed release as a wheel, with texts of some files replaced."""
    changed = {}
    for path, old, new in changes:
        text = changed.get(path) or (site / path).read_text()
        assert old in text
        changed[path] = text.replace(old, new)
    with zipfile.ZipFile(target, "w") as file:
        for source in (site / SRT).rglob("*.py"):
            path = source.relative_to(site).as_posix()
            file.writestr(path, changed.get(path) or source.read_text())
    return target


def test_the_same_release_differs_in_nothing(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(wheel_with(site, tmp_path / "same.whl")) == 0
    assert capsys.readouterr().out.endswith("; 0 of what is used of them differ\n")


def test_what_is_gone_or_called_otherwise_is_named(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = wheel_with(
        site,
        tmp_path / "other.whl",
        (f"{SRT}/managers/schedule_batch.py", "def prepare_for_extend(", "def prepare("),
        (f"{SRT}/distributed/bootstrap.py", "def init_layer_runtime(", "def layer_runtime("),
        (f"{SRT}/runtime_context.py", "def get_parallel()", "def get_parallel(which=0)"),
        (f"{SRT}/arg_groups/field_order.py", '"skip_tokenizer_init"', '"no_tokenizer"'),
    )
    assert main(wheel) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "sglang.srt.distributed.bootstrap.init_layer_runtime: gone",
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend: gone",
        "sglang.srt.runtime_context.get_parallel: with which=0",
        "option skip_tokenizer_init: gone",
    ]


def test_every_name_that_is_used_is_found_in_the_installed_release(site: Path) -> None:
    installed = Release(site)
    lost = [key for key in sorted(used_names().names) if installed.find(*key) is None]
    assert lost == []
