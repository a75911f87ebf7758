"""Files of every kind: what is read from them, and why others are left out."""

import gzip
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.inference.conversation import written
from cllm_spheres.text import reading
from cllm_spheres.text.dialogue import ASSISTANT, USER, Message
from cllm_spheres.text.encoding import encoding_of
from cllm_spheres.text.files import NotText
from cllm_spheres.text.reading import read_file
from cllm_spheres.text.spool import ROW, SpoolWriter

TEXT = "Grüße aus Köln, naïve façade — 12 spheres.\nSecond line.\n"


@pytest.fixture
def read(tmp_path):
    """bytes -> (documents, counts of what was skipped); the whole record in `run.last`."""

    def run(data, name="file.bin", begin=0, end=None):
        path = tmp_path / name
        path.write_bytes(data)
        spool = SpoolWriter(tmp_path, 0)
        run.last = read_file(str(path), spool, begin, end)
        assert run.last.documents == spool.close()
        text = (tmp_path / "0.txt").read_bytes()
        rows = np.fromfile(tmp_path / "0.index", ROW)
        assert rows["size"].sum() == len(text), "nothing of a dropped document stays in the spool"
        documents = [text[row["offset"] : row["offset"] + row["size"]].decode() for row in rows]
        return documents, dict(run.last.skipped)

    return run


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_text_is_read_in_its_encoding(read, encoding):
    assert read(TEXT.encode(encoding)) == ([TEXT], {})


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32-be"])
def test_big_endian_text_is_read_by_its_mark(read, encoding):
    assert read("\ufeff".encode(encoding) + TEXT.encode(encoding)) == ([TEXT], {})


def test_line_ends_stay_as_they_are(read):
    assert read(b"one\r\ntwo\rthree\n") == (["one\r\ntwo\rthree\n"], {})


def test_a_last_character_that_was_cut_off_is_left_away(read):
    assert read("Käse und é".encode()[:-1]) == (["Käse und "], {})


def test_a_cp1252_text_may_end_in_a_letter_that_begins_utf8(read):
    assert read("un café".encode("cp1252")) == (["un café"], {})


def test_a_text_may_hold_the_replacement_character(read):
    assert read("a \ufffd b".encode()) == (["a \ufffd b"], {})


LONG = "Grüße aus Köln, naïve façade — 12 spheres.\n" * 300


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_a_damaged_byte_costs_a_character_and_no_file(read, encoding):
    """A byte that is nothing in the encoding: of UTF-16 half a pair, of cp1252 one that is not defined."""
    bad = {"utf-16": b"\x00\xd8", "utf-32": b"\xff" * 4, "cp1252": b"\x81"}.get(encoding, b"\xff")
    begin, more = LONG.encode(encoding), LONG.encode(encoding)[len("".encode(encoding)) :]
    (text,), skipped = read(begin + bad + more)
    assert skipped == {} and read.last.lost == len(bad)
    assert text.replace("\ufffd", "") == LONG * 2 and text.count("\ufffd") == len(bad)


@pytest.mark.parametrize(("bad", "kept"), [(1, True), (10, True), (11, False)])
def test_a_thousandth_of_the_bytes_may_be_damaged(read, bad, kept):
    """One more, and the next encoding is tried, in which the same byte is a letter."""
    data = bytearray(b"plain words \n" * 770)[:10_000]
    data[0 : bad * 3 : 3] = b"\xff" * bad
    (text,), _ = read(bytes(data))
    assert (text.count("\ufffd"), read.last.lost) == ((bad, bad) if kept else (0, 0))
    assert text.count("ÿ") == (0 if kept else bad) and read.last.encoding == ("utf-8" if kept else "cp1252")


def test_a_zero_in_a_log_costs_a_character_and_no_file(read):
    assert read(LONG.encode() + b"\0\0" + LONG.encode()) == ([LONG + "\ufffd\ufffd" + LONG], {})


def test_rare_accents_in_an_english_text_are_those_of_cp1252(read):
    text = "plain words, and one café\n" + "plain words\n" * 500
    assert read(text.encode("cp1252")) == ([text], {})


def test_a_log_of_two_encodings_is_read_in_both(read):
    assert read("Käse, Öl, Gemüse\n".encode() + "Grüße\n".encode("cp1252")) == (["Käse, Öl, Gemüse\nGrüße\n"], {})
    assert read.last.encoding == "utf-8 with cp1252"


@pytest.mark.parametrize(("bad", "kept"), [(10, True), (11, False)])
def test_a_byte_that_is_in_neither_of_two_encodings_is_counted(read, bad, kept):
    text = "Käse, Öl, Gemüse\n".encode() * 100 + b"caf\xe9 " * 100
    data = b"\x81" * bad + text + b"." * (10_000 - bad - len(text))
    documents, skipped = read(data)
    assert (skipped == {}) is kept and (skipped == {"undecodable": 1}) is not kept
    assert not kept or (read.last.lost == bad == documents[0].count("\ufffd"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_known_without_its_mark(read, encoding):
    assert read(LONG.encode(encoding)) == ([LONG], {})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\r\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0", "binary"),
        (b"text at first " * 60 + b"\0", "binary"),
        (b"text at first " * 20 + b"\0\1\2\3" * 9, "binary"),
        (bytes(range(1, 256)) * 4, "binary"),
        (np.random.default_rng(0).bytes(5000), "binary"),
        ("Привет, мир. Как дела?".encode("cp1251"), "undecodable"),
        ("日本語のテキストです。".encode("shift_jis"), "undecodable"),
        (b"\xff\xfe\x00\xd8\x00\xd8a\0", "undecodable"),
        (b"PK\x03\x04 a zip of something", "binary"),
        (gzip.compress(b"hello hello hello", mtime=0)[:-9], "damaged gz"),
        (gzip.compress(b"\0\1\2\3", mtime=0), "binary"),
        (b"%PDF-1.7 nothing more", "damaged pdf"),
        (b"PK\x03\x04 word/document.xml", "damaged docx"),
    ],
)
def test_what_is_no_text_is_counted_by_its_reason(read, data, reason):
    assert read(data) == ([], {reason: 1})


def test_html_becomes_its_visible_text(read):
    page = """<!-- saved --><!DOCTYPE html><html><head><title>A &amp; B</title><style>p {}</style>
    <script>if (a < b) { x("<p>"); }</script></head><body><h1>Head</h1><p>one <b>two</b>,
    three&nbsp;four<br>five<pre>a  b
      c</pre><ul><li>x<li>y</ul></body></html>"""
    ((text,), skipped) = read(page.encode(), "page.txt")
    assert text == "A & B\nHead\none two, three four\nfive\na  b\n      c\nx\ny\n"
    assert skipped == {}


def test_text_that_only_mentions_html_is_text(read):
    assert read(b"See <html> and <p>this</p>") == (["See <html> and <p>this</p>"], {})


def test_every_line_of_a_jsonl_is_a_document(read):
    lines = [{"text": "one\ntwo"}, {"content": "three"}, {"id": 1}, {"text": " "}, {"text": "é\ud800"}]
    data = "\n\n".join(map(json.dumps, lines)) + "\n{broken\n[1]"
    assert read(data.encode()) == (
        ["one\ntwo", "three", "é?"],
        {"jsonl line without text": 2, "empty": 1, "broken jsonl line": 1},
    )


DIALOGUE = "Be brief.\n\nUser: Why twelve?\nAssistant: No more fit.\nUser: In 24 dimensions?\nAssistant: 196,560\n"
TURNS = [
    {"role": "user", "content": "Why twelve? "}, {"role": "assistant", "content": "No more fit."},
    {"role": "user", "content": [{"type": "text", "text": "In 24 dimensions?"}]},
    {"role": "assistant", "content": "196,560"}, {"role": "system", "content": "Be brief."},
]  # fmt: skip


def test_a_dialogue_is_written_as_chat_and_serve_write_it(read):
    lines = [
        {"id": 7, "messages": TURNS}, {"prompt": "Why twelve?", "completion": "No more fit."},
        {"prompt": TURNS[:1], "completion": TURNS[1:2]}, {"messages": [{"role": "tool", "content": "4"}]},
        {"messages": [{"role": "user", "content": None}]}, {"messages": "none"},
    ]  # fmt: skip
    pair = "User: Why twelve?\nAssistant: No more fit.\n"
    assert read("\n".join(map(json.dumps, lines)).encode(), "a.jsonl") == (
        [DIALOGUE, pair, pair], {"jsonl line with another dialogue": 3},
    )  # fmt: skip
    assert read.last.kind == "dialogue"
    assert pair.startswith(written([Message(USER, "Why twelve?")])), "the question, and where an answer begins"
    assert written([Message(USER, "Why twelve?"), Message(ASSISTANT, "No more fit.")]).startswith(pair)


@pytest.mark.parametrize(
    ("name", "data", "fields"),
    [
        ("a.jsonl", b'{"id": 1, "body": "x"}\n', ["id", "body"]), ("a.ndjson.gz", b'{"q": 1}', ["q"]),
        ("a.txt", b'{"q": 1}\n{"q": 2}\n', ["q"]), ("a.json", b'{"q": 1}', []), ("a.jsonl", b"{not json}", []),
        ("a.jsonl", b'{"text": "x"}', []),
    ],
)  # fmt: skip
def test_json_lines_without_a_known_field_are_named_with_those_they_have(read, name, data, fields):
    read(data, name)
    assert read.last.fields == fields


@pytest.mark.parametrize("data", [b'{"a": 1}\n{"text": "no"}', b'{\n "text": "pretty"\n}', b"{not json}", b"{}"])
def test_other_json_is_plain_text(read, data):
    assert read(data) == ([data.decode()], {})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 400), max_size=12), st.integers(1, 500))
def test_ranges_of_a_jsonl_give_every_line_once(tmp_path_factory, lengths, step):
    folder = tmp_path_factory.mktemp("ranges")
    data = "\n".join(json.dumps({"text": f"{i}:" + "x" * n}) for i, n in enumerate(lengths)).encode()
    (folder / "a.jsonl").write_bytes(data)
    spool = SpoolWriter(folder, 0)
    for begin in range(0, len(data), step):
        assert not read_file(str(folder / "a.jsonl"), spool, begin, min(begin + step, len(data))).skipped
    assert spool.close() == len(lengths)
    assert (folder / "0.txt").read_text() == "".join(f"{i}:" + "x" * n for i, n in enumerate(lengths))


@pytest.mark.parametrize(
    "inner", [TEXT.encode(), json.dumps({"text": TEXT}).encode(), gzip.compress(TEXT.encode(), mtime=0)]
)
def test_gz_is_read_as_what_it_holds(read, inner):
    assert read(gzip.compress(inner, mtime=0) + gzip.compress(b"") * 2, "a.txt") == ([TEXT], {})


def docx_bytes():
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_paragraph("First paragraph.")
    table = document.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "left", "right"
    document.add_paragraph("Last one.")
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def pdf_bytes(text="Kissing spheres"):
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    out, places = b"%PDF-1.4\n", []
    for i, body in enumerate(objects):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (i + 1, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 5\n0000000000 65535 f \n%strailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )


def test_a_docx_gives_its_paragraphs_and_tables_in_order(read):
    assert read(docx_bytes(), "letter.txt") == (["First paragraph.\nleft\tright\nLast one.\n"], {})


def test_a_pdf_gives_its_text(read):
    pytest.importorskip("pypdf")
    assert read(pdf_bytes(), "scan") == (["Kissing spheres"], {})


def test_documents_without_their_libraries_are_counted_apart(read, monkeypatch):
    data = docx_bytes()
    monkeypatch.setitem(__import__("sys").modules, "docx", None)
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    assert read(pdf_bytes()) == ([], {"pdf": 1})
    assert read(data) == ([], {"docx": 1})


def test_a_zip_of_other_things_is_binary(read):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("notes.txt", TEXT)
    assert read(out.getvalue()) == ([], {"binary": 1})


def test_a_file_that_cannot_be_read_is_counted(tmp_path):
    spool = SpoolWriter(tmp_path, 0)
    assert read_file(str(tmp_path / "gone.txt"), spool).skipped == {"unreadable": 1}
    assert read_file(str(tmp_path), spool).reason == "unreadable"
    assert spool.close() == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("data", [
    TEXT.encode(), TEXT.encode("utf-16"), TEXT.encode("utf-32"), TEXT.encode("cp1252"),
    gzip.compress(TEXT.encode(), mtime=0), f"<html><body><p>{TEXT}</p></body></html>".encode(),
    b'{"text": "a"}\n{"text": "b c"}\n',
])  # fmt: skip
def test_streaming_in_small_chunks_reads_the_same(read, monkeypatch, data, size):
    whole = read(data)

    def chunks(file):
        yield file.read(60)  # the kind is decided on the first chunk: in earnest 1 MB
        while part := file.read(size):
            yield part

    monkeypatch.setattr(reading, "_until_empty", chunks)
    assert read(data) == whole


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_counted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    (folder / "x").write_bytes(data)
    spool = SpoolWriter(folder, 0)
    read = read_file(str(folder / "x"), spool)
    assert spool.close() + sum(read.skipped.values()) >= 1
    assert bool(read.reason) != bool(read.documents)


def test_reasons_for_bad_bytes_are_those_of_the_list():
    with pytest.raises(NotText, match="binary"):
        encoding_of(lambda: iter([b"\0"]), b"\0")


def test_an_unknown_section_of_html_is_a_comment(read):
    assert read(b"<html><p>one<![foo[ x ]>two</html>")[0] == ["onetwo\n"]


def test_html_with_a_number_of_too_many_digits_is_counted(read):
    assert read(b"<html>a &#" + b"9" * 5000 + b"; b</html>") == ([], {"damaged html": 1})


@pytest.mark.timeout(60)  # Python's parser alone needs minutes for each
@pytest.mark.parametrize("unit", [b"<a ", b"<!--", b"<a b='", b"</a", b"<?"])
def test_html_that_never_ends_a_tag_takes_no_time(read, unit):
    assert read(b"<html>one<br>" + unit * 100_000)[0] == ["one\n"]
