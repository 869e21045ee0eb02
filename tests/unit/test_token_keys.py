"""Samples are found again by what they are made of."""

import datetime as dt
from pathlib import Path

import numpy as np

from kdflow_core.data.conversations import Conversation
from kdflow_core.data.known_samples import sample_key
from storage.token_keys import TokenKeys, write_keys


def test_rows_are_found_by_their_keys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys: list[bytes | None] = [rng.bytes(16) for _ in range(300)]
    keys[7] = bytes(15) + b"\1"
    keys[8] = keys[9] = b"\1" + bytes(15)  # equal ones, with zeros at the end
    keys[20] = None
    write_keys(tmp_path / "keys.arrow", keys)
    found = TokenKeys(tmp_path / "keys.arrow")
    for row, key in enumerate(keys):
        if key is not None:
            assert found.row(key) == (8 if row == 9 else row)
    assert found.row(bytes(16)) is None
    write_keys(tmp_path / "none.arrow", [None])
    assert TokenKeys(tmp_path / "none.arrow").row(bytes(16)) is None


def test_a_key_goes_by_all_that_tokens_are_made_of() -> None:
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    given = Conversation(messages=messages, label=None)
    others = [
        Conversation(messages=messages, label="y"),
        Conversation(messages=messages, label=None, tools=({"name": "f"},)),
        Conversation(messages=messages, label=None, unsupervised=frozenset({1})),
        Conversation(messages=(messages[0] | {"mood": "good"}, messages[1]), label=None),
        Conversation(messages=(messages[0] | {"content": "x "}, messages[1]), label=None),
        Conversation(messages=messages[:1], label=None),
    ]
    keys = {sample_key(own, "rows") for own in [given, *others]} | {sample_key(given, "other")}
    assert len(keys) == len(others) + 2
    again = Conversation(messages=tuple(dict(m) for m in messages), label=None)
    assert sample_key(again, "rows") == sample_key(given, "rows")


def test_what_json_has_no_form_for_has_a_key() -> None:
    message = {"role": "user", "content": "\ud800", "at": dt.date(2026, 11, 30)}
    own = Conversation(messages=(message,), label=None)
    later = Conversation(messages=(message | {"at": dt.date(2026, 12, 1)},), label=None)
    assert len(sample_key(own, "rows")) == 16
    assert sample_key(own, "rows") != sample_key(later, "rows")
