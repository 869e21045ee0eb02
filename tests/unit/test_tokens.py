"""Token tables: views that are stored once, alignments, media; and what a digest covers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdflow_core.batching import taught_tokens, teacher_rows
from kdflow_core.contracts import Alignment, Example, HiddenRows, TokenSequence, TopKRows
from kdflow_core.errors import AlignmentError
from storage.errors import StoreCorruptError
from storage.tokens import TokenTable, TokenWriter
from tasks.jobs.stored import TokenExamples, token_row

PICTURES = (b"a" * 16, b"b" * 16)


def sequence(ids: list[int], first: int = 1, media: tuple[bytes, ...] = ()) -> TokenSequence:
    return TokenSequence(
        ids_T=np.array(ids, np.int32), supervised_T=np.arange(len(ids)) >= first, media=media
    )


def stored(path: Path, examples: list[Example], views: tuple[str, ...]) -> TokenTable:
    with TokenWriter(path, views) as writer:
        for example in examples:
            writer.add(token_row(example))
    return TokenTable(path)


def test_every_view_comes_back(tmp_path: Path) -> None:
    """Also where some rows of a view are the student's again, and others are not."""
    same, other = sequence([1, 2, 3, 4]), sequence([9, 8, 7], first=2)
    odd = sequence([5, 6], media=PICTURES)
    examples = [
        Example(source="s", views={"student": same, "teacher": same, "math": other}),
        Example(source="s", views={"student": other, "teacher": same, "math": other}),
        Example(source="t", views={"student": odd, "teacher": other, "math": odd}),
    ]
    table = stored(tmp_path / "a.arrow", examples, ("student", "teacher", "math"))
    found = TokenExamples(table)
    for view in table.views:
        expected = [example.views[view] for example in examples]
        assert table.lengths(view).tolist() == [len(e.ids_T) for e in expected]
        assert table.supervised_counts(view).tolist() == [
            int(e.supervised_T.sum()) for e in expected
        ]
        assert [bytes(d) for d in table.digests(view)] == [e.digest for e in expected]
        for index, one in enumerate(expected):
            got = found[index].views[view]
            np.testing.assert_array_equal(got.ids_T, one.ids_T)
            np.testing.assert_array_equal(got.supervised_T, one.supervised_T)
            assert got.media == one.media
            assert got.digest == one.digest


def test_equal_views_are_stored_once(tmp_path: Path) -> None:
    examples = [
        Example(source="s", views=dict.fromkeys(("student", "teacher"), sequence([k, 2, 3])))
        for k in range(3000)
    ]
    stored(tmp_path / "a.arrow", examples, ("student", "teacher"))
    with pa.ipc.open_file(str(tmp_path / "a.arrow")) as file:
        column = file.read_all().column("teacher_ids")
    assert column.null_count == 3000


def test_an_alignment_comes_back(tmp_path: Path) -> None:
    alignment = Alignment(
        pairs_P2=np.array([[0, 0], [3, 2]], np.int32),
        spans_S4=np.array([[1, 3, 1, 2], [3, 4, 2, 3], [4, 5, 3, 5]], np.int32),
    )
    views = {"student": sequence([1, 2, 3, 4, 5]), "teacher": sequence([6, 7, 8, 9, 9])}
    aligned = Example(source="s", views=views, alignments={"teacher": alignment})
    plain = Example(source="s", views=views)
    found = TokenExamples(stored(tmp_path / "a.arrow", [plain, aligned], ("student", "teacher")))
    assert found[0].alignments == {}
    np.testing.assert_array_equal(found[1].alignments["teacher"].pairs_P2, alignment.pairs_P2)
    np.testing.assert_array_equal(found[1].alignments["teacher"].spans_S4, alignment.spans_S4)


def test_a_file_without_views_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.arrow"
    table = pa.table({"student_ids": [[1]], "teacher_ids": [[1]]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(StoreCorruptError, match="does not name its views"):
        TokenTable(path)


def test_a_digest_covers_all_that_a_model_reads() -> None:
    """One text with other pictures, or with these in another order, is another sequence."""
    texts = [[1, 2, 3], [1, 2, 4], [1, 2, 3, 3]]
    media = [(), PICTURES[:1], PICTURES[1:], PICTURES, PICTURES[::-1]]
    digests = {
        sequence(ids, first, own).digest for ids in texts for first in (1, 2) for own in media
    }
    assert len(digests) == len(texts) * 2 * len(media)
    with pytest.raises(ValueError, match="has 16 bytes"):
        _ = sequence([1], media=(b"short",)).digest


class Says:
    """A source that says one thing of everything."""

    hidden_size = 4

    def __init__(self, rows: HiddenRows | TopKRows) -> None:
        self._rows = rows

    def begin_step(self, step: int) -> None:
        pass

    def rows(self, sequence: TokenSequence) -> HiddenRows | TopKRows:
        return self._rows


def test_rows_are_those_of_the_tokens_that_a_teacher_says_something_about() -> None:
    import torch

    views = dict.fromkeys(("student", "teacher"), sequence([1, 2, 3]))
    hidden = HiddenRows(buffer_RH=torch.zeros(9, 4), index_N=torch.tensor([5, 7]))
    plain = Example(source="s", views=views)
    assert teacher_rows(plain, Says(hidden)) is hidden
    assert taught_tokens(plain).tolist() == [0, 1]
    alignment = Alignment(pairs_P2=np.array([[1, 0]]), spans_S4=np.zeros((0, 4)))
    aligned = Example(source="s", views=views, alignments={"teacher": alignment})
    assert teacher_rows(aligned, Says(hidden)).index_N.tolist() == [5]
    assert taught_tokens(aligned).tolist() == [1]


def test_signals_without_states_are_refused() -> None:
    import torch

    views = dict.fromkeys(("student", "teacher"), sequence([1, 2, 3]))
    top = TopKRows(
        ids_NK=torch.zeros(2, 1), log_probs_NK=torch.zeros(2, 1), log_tail_N=torch.zeros(2)
    )
    with pytest.raises(AlignmentError, match="not hidden states"):
        teacher_rows(Example(source="s", views=views), Says(top))
