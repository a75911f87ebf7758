"""The spool: cutting text into pieces never loses, doubles or breaks anything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.text import spool as spool_module
from cllm_spheres.text.split import split_documents
from cllm_spheres.text.spool import Part, SpoolReader, SpoolWriter, read_index

texts = st.lists(st.text(alphabet="ab \n\té球", min_size=1, max_size=80).filter(str.strip), min_size=1, max_size=8)


def spooled(folder, documents, per_file=3):
    num_files = -(-len(documents) // per_file)
    for number in range(num_files):
        writer = SpoolWriter(folder, number)
        for text in documents[number * per_file : (number + 1) * per_file]:
            writer.write(text)
            assert writer.end()
        writer.close()
    return read_index(folder, num_files)


@settings(deadline=None)
@given(texts, st.integers(1, 60), st.integers(10, 40), st.integers(4, 9))
def test_ranges_give_every_character_and_every_border_once(tmp_path_factory, documents, step, piece, window):
    folder = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "PIECE_BYTES", piece)
        patch.setattr(spool_module, "CUT_WINDOW", window)
        rows, num_duplicates = spooled(folder, documents)
        unique = list(dict.fromkeys(documents))
        assert (len(rows), num_duplicates) == (len(unique), len(documents) - len(unique))
        total = int(rows["size"].sum())
        reader = SpoolReader(folder, Part(rows, 0, total))
        joined = ""
        for low in range(0, total, step):
            for text, starts_document in reader.pieces(low, min(low + step, total)):
                assert len(text.encode()) <= piece + window
                joined += "|" * starts_document + text
        assert joined == "|".join(unique)
        reader.close()


@settings(deadline=None)
@given(texts, st.floats(0, 0.99), st.integers(1, 60))
def test_a_split_by_position_gives_every_character_once(tmp_path_factory, documents, fraction, step):
    folder = tmp_path_factory.mktemp("split")
    rows, _ = spooled(folder, documents)
    train, val, how = split_documents(rows, fraction, folder)
    assert how == "position" and train.low == 0 and train.high == val.low and val.high == rows["size"].sum()
    assert train.high > 0
    text = ""
    for part in (train, val):
        reader = SpoolReader(folder, part)
        for low in range(part.low, part.high, step):
            text += "".join(text for text, _ in reader.pieces(low, min(low + step, part.high)))
        reader.close()
    assert text == "".join(dict.fromkeys(documents)) and "\ufffd" not in text


def test_cuts_prefer_a_new_line_then_a_blank_then_a_whole_character(tmp_path):
    rows, _ = spooled(tmp_path, ["one two\nthree four", "éééé"])
    reader = SpoolReader(tmp_path, Part(rows, 0, int(rows["size"].sum())))
    assert reader.cut(0, 12) == len("one two\n")
    assert reader.cut(0, 6) == len("one")
    assert reader.cut(0, 16, newline_window=4) == len("one two\nthree")
    assert [reader.cut(1, n) for n in (1, 2, 3)] == [0, 2, 2]


def test_a_document_stays_in_its_part_when_others_come(tmp_path):
    documents = [f"document {i} " * 5 for i in range(300)]
    rows, _ = spooled(tmp_path, documents)
    few = split_documents(rows[:200], 0.2, tmp_path)
    many = split_documents(rows, 0.2, tmp_path)
    assert few[2] == many[2] == "document"
    for a, b in zip(few[:2], many[:2], strict=True):
        assert set(a.rows["hash"]) <= set(b.rows["hash"])
    assert 0.1 < len(many[1].rows) / len(rows) < 0.3


def test_a_split_by_document_leaves_no_part_empty(tmp_path):
    rows, _ = spooled(tmp_path, [f"document {i}" for i in range(20)])
    for fraction in (1e-9, 1 - 1e-9):
        train, val, _ = split_documents(rows, fraction, tmp_path)
        assert len(train.rows) >= 1 and len(val.rows) >= 1
    train, val, _ = split_documents(rows, 0, tmp_path)
    assert len(train.rows) == 20 and val.high == 0


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
