"""What is shown, recorded and hashed has no secrets, and loses nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run
from configs.printable import fenced, printable
from configs.secrets import public, public_config
from kdflow_core.errors import DataError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://me:s3cret@host/data.jsonl", "https://host/data.jsonl"),
        ("https://ghp_s3cret@host/data.jsonl", "https://host/data.jsonl"),
        ("https://me:p@s3cret@host:8080/d", "https://host:8080/d"),
        ("http://me:s3c/r+et/==@host/d@v1", "http://v1"),  # rather too much than too little
        ("https://host/d.jsonl?X-Amz-Signature=s3cret&x=1", "https://host/d.jsonl"),
        (
            "https://account.blob/c/d.parquet?sv=1&sig=s3cret#part",
            "https://account.blob/c/d.parquet",
        ),
        ("https://host#access_token=s3cret", "https://host"),
        ("simplecache::https://me:s3cret@host/d", "simplecache::https://host/d"),
        ("SFTP://me:s3cret@host/d", "SFTP://host/d"),
        ("(https://a:s3cret@h/x, 'http://b:s3cret@h/y?sig=s3cret')", "(https://h/x, 'http://h/y')"),
        # Nothing to hide.
        ("http://host:8080/data@v1.jsonl", "http://host:8080/data@v1.jsonl"),
        ("http://127.0.0.1:9/a@b", "http://127.0.0.1:9/a@b"),
        ("s3://bucket/data@v1/x.jsonl", "s3://bucket/data@v1/x.jsonl"),
        (
            "abfs://container@account.dfs.core.windows.net/x",
            "abfs://container@account.dfs.core.windows.net/x",
        ),
        ("me@example.org, see a?b and c#d: 3 // 4", "me@example.org, see a?b and c#d: 3 // 4"),
        ("/data/odd?name#1@2.jsonl", "/data/odd?name#1@2.jsonl"),
    ],
)
def test_urls(given: str, shown: str) -> None:
    assert public(given) == shown
    assert public(public(given)) == shown


def test_nested_values() -> None:
    nested = {"a": [{"https://u:p@h/x": ("https://h/y?z", 3, None)}], "b": 1.5}
    assert public(nested) == {"a": [{"https://h/x": ("https://h/y", 3, None)}], "b": 1.5}


def test_errors_never_show_them() -> None:
    assert str(DataError("cannot read https://me:s3cret@h/x?sig=s3cret: gone")) == (
        "cannot read https://h/x: gone"
    )


@pytest.mark.parametrize("field", ["storage.root", "data.sources.0.path", "teacher.model.path"])
def test_keys_of_an_object_store_are_refused_and_not_shown(field: str) -> None:
    """No library reads them there: the bucket would have their name."""
    with pytest.raises(ConfigError, match="credentials do not belong into it") as caught:
        load_run(
            "quickstart",
            {"teacher.model": {"type": "pretrained", "path": "x"}}
            | {field: "s3://AKIA:s3cret@bucket/x.jsonl"},
        )
    assert "s3cret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_the_name_of_a_source_is_that_of_its_file() -> None:
    run = load_run(
        "quickstart",
        {
            "data.sources.0.path": "https://u:p@h/d/sums.jsonl?sig=s3cret",
            "data.sources.0.name": None,
        },
    )
    assert run.data.source_names[0] == "sums.jsonl"


@pytest.mark.parametrize("text", ["```\n# mine", "`" * 40, "plain", "a ~~~ b", "``` ```` `"])
def test_nothing_closes_a_fence(text: str) -> None:
    first, *inner, last = fenced(text).splitlines()
    assert first == last
    assert set(first) == {"`"}
    assert all(not line.strip().startswith(first) for line in inner)


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9b\u202ec\td\n") == "a\\x1b[2Jb\\r\\x07\\x9b\\u202ec\td\n"


def test_of_environment_variables_the_names_alone_are_shown(
    make_recipe: Callable[..., Path],
) -> None:
    workers = {"type": "ray", "env": {"HF_TOKEN": "a-secret"}}
    run = load_run(str(make_recipe()), {"workers": workers})
    shown = public_config(run)
    assert "a-secret" not in str(shown)
    assert list(shown["workers"]["env"]) == ["HF_TOKEN"]
    assert run.workers.env == {"HF_TOKEN": "a-secret"}  # type: ignore[union-attr]
