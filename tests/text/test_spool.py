"""The spool: cutting text into pieces never loses, doubles or breaks anything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.text import spool as spool_module
from cllm_spheres.text.spool import Part, SpoolReader, SpoolWriter
from tests.text.spooled import spooled

texts = st.lists(st.text(alphabet="ab \n\té球", min_size=1, max_size=80).filter(str.strip), min_size=1, max_size=8)


@settings(deadline=None)
@given(texts, st.integers(1, 60), st.integers(10, 40), st.integers(4, 9))
def test_ranges_give_every_character_and_every_border_once(tmp_path_factory, documents, step, piece, window):
    folder = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "PIECE_BYTES", piece)
        patch.setattr(spool_module, "CUT_WINDOW", window)
        rows, first = spooled(folder, documents)
        unique = list(dict.fromkeys(documents))
        assert len(rows) == len(unique) and first.tolist() == [documents.index(text) for text in documents]
        total = int(rows["size"].sum())
        reader = SpoolReader(folder, Part(rows))
        joined = ""
        for low in range(0, total, step):
            for text, _, starts_document in reader.pieces(low, min(low + step, total)):
                assert len(text.encode()) <= piece + window
                joined += "|" * starts_document + text
        assert joined == "|".join(unique)
        reader.close()


def test_cuts_prefer_a_new_line_then_a_blank_then_a_whole_character(tmp_path):
    rows, _ = spooled(tmp_path, ["one two\nthree four", "éééé"])
    reader = SpoolReader(tmp_path, Part(rows))
    assert reader.cut(0, 12) == len("one two\n")
    assert reader.cut(0, 6) == len("one")
    assert [reader.cut(1, n) for n in (1, 2, 3)] == [0, 2, 2]


def test_a_document_taken_back_leaves_no_trace(tmp_path):
    writer = SpoolWriter(tmp_path, 0)
    writer.write("kept")
    writer.end()
    mark = writer.mark()
    for text in ("one", "two"):
        writer.write(text)
        writer.end()
    writer.write("half")
    writer.abort(mark)
    writer.write("last")
    writer.end()
    assert writer.close() == 2
    assert (tmp_path / "0.txt").read_text() == "keptlast"
    assert np.fromfile(tmp_path / "0.index", spool_module.ROW)["size"].tolist() == [4, 4]
