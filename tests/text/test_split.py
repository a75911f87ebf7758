"""The training and the validation part: the share that was asked for, and nothing lost or doubled."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.split import LARGE, split_documents
from tests.text.spooled import spooled, texts_of

WORDS = ["each", "sphere", "learns", "its", "own", "part", "of", "a", "naïve", "text", "that", "all", "share"]


def words(rng, size, lines):
    """About `size` bytes of sentences, as lines or as one line."""
    sentences = [" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(size // 40)]
    return ("\n" if lines else " ").join(sentences) + "\n"


def document(rng, number, size, lines=True):
    return f"{number} {words(rng, size, lines)}"


def share_of(train, val):
    return val.size / (train.size + val.size)


texts = st.lists(
    st.text(alphabet="ab.! \n\té球。", min_size=1, max_size=300).filter(str.strip), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=60)
@given(texts, st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 1e-320, 1e-9, 0.01, 0.1, 0.5])), st.integers(1, 60))
def test_every_character_of_a_document_is_in_one_part(tmp_path_factory, documents, fraction, step):
    folder = tmp_path_factory.mktemp("split")
    rows, _ = spooled(folder, documents)
    train, val = split_documents(rows, fraction, folder)
    assert train.size > 0 and (val.size == 0 or fraction > 0)
    pieces = [texts_of(folder, part, step) for part in (train, val)]
    assert [len(texts) for texts in pieces] == [len(train.rows), len(val.rows)]
    found = {}
    for part, texts in zip((train, val), pieces, strict=True):
        for row, text in zip(part.rows, texts, strict=True):
            found[int(row["file"]), int(row["offset"])] = text
    joined = "".join(text for _, text in sorted(found.items()))
    assert joined == "".join(dict.fromkeys(documents)), "no byte is lost, doubled, or half of a character"


CORPORA = {
    "one large document in one line among 150": [
        (1_000_000, False),
        *((size, True) for size in range(200, 20_000, 132)),
    ],
    "forty small ones and one large": [*((500 + 60 * i, True) for i in range(40)), (400_000, True)],
    "thirty of about the same size": [(3000 + 100 * i, True) for i in range(30)],
    "three": [(2000, True), (30_000, False), (700, True)],
    "one": [(50_000, False)],
    "a few notes": [(200, True)] * 8,
    "many": [(100 + i, True) for i in range(600)],
}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("sizes", CORPORA.values(), ids=CORPORA.keys())
def test_the_validation_part_has_the_share_that_was_asked_for(tmp_path, sizes, fraction):
    rng = random.Random(1)
    documents = [document(rng, number, size, lines) for number, (size, lines) in enumerate(sizes)]
    rows, _ = spooled(tmp_path, documents)
    train, val = split_documents(rows, fraction, tmp_path)
    # A tenth of what was asked for; in a text of some hundred words a word more or less is more than that.
    assert share_of(train, val) == pytest.approx(fraction, rel=0.1, abs=64 / rows["size"].sum())


def test_a_large_document_is_cut_at_the_end_of_a_sentence_and_stands_in_both_parts(tmp_path):
    rng = random.Random(2)
    documents = [document(rng, 0, 100_000, lines=False), *(document(rng, n, 2000) for n in range(1, 60))]
    rows, _ = spooled(tmp_path, documents)
    assert rows["size"][0] > LARGE * rows["size"].sum() > rows["size"][1:].max()
    train, val = split_documents(rows, 0.1, tmp_path)
    (head, *kept), (tail, *held) = texts_of(tmp_path, train), texts_of(tmp_path, val)
    assert head + tail == documents[0] and head.endswith(". ")
    assert len(tail) == pytest.approx(0.1 * len(documents[0]), rel=0.1)
    assert sorted(kept + held) == sorted(documents[1:]), "the others stay whole"


def test_a_document_stays_in_its_part_when_others_come(tmp_path):
    rows, _ = spooled(tmp_path, [f"document {i} " * 5 for i in range(9000)], per_file=1000)
    few = split_documents(rows[:6000], 0.2, tmp_path)
    many = split_documents(rows, 0.2, tmp_path)
    for a, b in zip(few, many, strict=True):
        assert set(a.rows["hash"]) <= set(b.rows["hash"])
    assert len(few[0].rows) + len(few[1].rows) == 6000, "none of many is cut"


def test_the_smallest_share_still_gives_a_validation_part(tmp_path):
    rows, _ = spooled(tmp_path, [f"document {i}" for i in range(20)])
    for fraction in (1e-9, 1 - 1e-9):
        train, val = split_documents(rows, fraction, tmp_path)
        assert train.size >= 1 and val.size >= 1


def test_a_share_that_cannot_be_had_is_told_with_both_numbers(tmp_path):
    """Tokens are not bytes: a text of two halves, where a word of the later one is a character."""
    (tmp_path / "a.txt").write_text("everlasting " * 4500 + "a " * 3000)
    prepared = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="word")
    assert prepared.val_share == pytest.approx(0.4, abs=0.01)
    assert prepared.share_warning().startswith("40 % of the tokens are for validation, and 10 % were asked for.")
    assert prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte").share_warning() == ""
