"""`cllm-spheres crystal`: what it shows is what was counted, on any terminal, and bad input is told."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from cllm_spheres_cli.app import app
from cllm_spheres_cli.crystal_corpus import SPACE, Corpus, visible
from rich.cells import cell_len
from typer.testing import CliRunner

from cllm_spheres.crystal.similarity import similarity
from cllm_spheres.crystal.ulam import place
from cllm_spheres.errors import InputError
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared
from tests.runs import char_corpus, command, corpus, train_whole  # noqa: F401


@pytest.fixture
def show(monkeypatch):
    """What the command prints into a pipe, so many columns wide."""

    def run(*words, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        result = CliRunner().invoke(app, ["crystal", *map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    return run


def refusal(*words):
    """The error that a command line ends with."""
    error = CliRunner().invoke(app, ["crystal", *map(str, words)]).exception
    assert isinstance(error, InputError), error
    return str(error)


def made(tmp_path, text, tokenizer="char"):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return prepare([tmp_path / "text.txt"], tmp_path / "made", tokenizer=tokenizer).folder


# ---- tokens


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (b" the", f"{SPACE}the"), (b"\n\t\r", r"\n\t\r"), (b"\xff", r"\xff"), (b"\xe2\x82", r"\xe2\x82"),
        (b"\x1b[2J", r"\x1b[2J"), (b"\x00", r"\x00"), ("é€".encode(), "é€"), ("\u202e".encode(), r"\u202e"),
        ("\u0301".encode(), "\u25cc\u0301"), ("\U000e0001".encode(), r"\U000e0001"), (b"", ""),
    ],
)  # fmt: skip
def test_nothing_in_a_token_can_move_the_cursor(piece, expected):
    assert visible(piece) == expected
    assert visible(piece).isprintable()


def test_a_token_is_found_by_its_text_its_look_and_its_id(tmp_path):
    corpus = Corpus.of(Prepared.open(made(tmp_path, "aaaa bbb\n77 3" * 30)))  # noqa: F811
    tokenizer = corpus.prepared.tokenizer
    for text in "ab37 \n":
        (i,) = tokenizer.encode(text)
        assert corpus.id_of(corpus.find(text)) == i
    assert corpus.find(SPACE) == corpus.find(" ") and corpus.find(r"\n") == corpus.find("\n")
    assert corpus.id_of(corpus.find("2")) == 2 and corpus.id_of(corpus.find("3")) == tokenizer.encode("3")[0]
    assert corpus.id_of(corpus.find("<|endoftext|>")) == tokenizer.eot


def test_a_byte_that_is_no_text_is_found(corpus):  # noqa: F811
    tokens = Corpus.of(Prepared.open(corpus))
    assert tokens.id_of(tokens.find("\udcff")) == 255 == tokens.id_of(tokens.find(r"\xff"))


# ---- views


def test_the_spiral_shows_each_number_above_its_token_and_marks_the_primes(show, char_corpus):  # noqa: F811
    tokens = Corpus.of(Prepared.open(char_corpus))
    lines = show(char_corpus, "--count", 25, columns=60).splitlines()  # 5 x 5 cells of 12 columns
    for n in range(1, 26):
        x, y = place(n)
        row, column = 2 * (2 - y), 12 * (x + 2)
        mark = "*" if n in (2, 3, 5, 7, 11, 13, 17, 19, 23) else ""
        assert lines[row][column : column + 12].strip() == f"{n}{mark}"
        assert lines[row + 1][column : column + 12].strip() == tokens.label(n)
    said = re.search(r"9 of 25 numbers are primes; their tokens are ([\d.]+)% of the text", " ".join(lines))
    share = 100 * sum(tokens.counts_V[p - 1] for p in (2, 3, 5, 7, 11, 13, 17, 19, 23)) / tokens.counts_V.sum()
    assert float(said[1]) == pytest.approx(share, abs=0.05)  # one digit is shown


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_spiral_fits_its_columns(show, corpus, columns):  # noqa: F811
    for count in ((), ("--count", 257)):
        picture = show(corpus, *count, columns=columns).split("\n\n")[0].splitlines()
        assert max(map(len, picture)) <= columns


def test_wide_characters_move_nothing(show, tmp_path):
    folder = made(tmp_path, "\u6f22\u5b57\u8a9e\U0001f600abc\n" * 30)
    lines = show(folder, "--count", 8, columns=36).split("\n\n")[0].splitlines()
    assert len(lines) == 6 and {cell_len(line) for line in lines} == {36}
    rows = [line for line in show(folder, "--show", "groups").splitlines() if line[:1] in ("│", "└")]
    assert len({cell_len(row) for row in rows}) == 1


def test_a_large_spiral_shows_the_primes_alone(show, corpus):  # noqa: F811
    picture = show(corpus, "--count", 257, columns=40).split("\n\n")[0]
    assert picture.count("\u25cf") == 55 and picture.count("\u00b7") == 257 - 55


def test_the_neighbours_are_those_of_all_pairs(show, char_corpus):  # noqa: F811
    tokens = Corpus.of(Prepared.open(char_corpus))
    a = tokens.find("e")
    for weights in ((0.7, 0.3), (1.0, 0.0), (0.0, 2.0)):
        words = [char_corpus, "--token", "e", "--count", 7, "--gcd-weight", weights[0], "--ulam-weight", weights[1]]
        rows = [re.split(r"\s*│\s*", line)[1:-1] for line in show(*words).splitlines() if line.startswith("│")]
        others = sorted((-similarity(a, b, *weights), b) for b in range(1, tokens.size + 1) if b != a)[:7]
        assert [int(row[3]) for row in rows] == [b for _, b in others]
        for row, (s, b) in zip(rows, others, strict=True):
            assert row[0] == tokens.label(b) and int(row[1]) == tokens.id_of(b)
            assert int(row[4]) == np.gcd(a, b)
            assert float(row[6]) == pytest.approx(-s, abs=6e-5)  # four digits are shown
            assert float(row[7]) + float(row[8]) == pytest.approx(-s, abs=2e-4)
    assert show(char_corpus, "--token", "e").startswith(f"e  id {tokens.id_of(a)}, ")


def test_the_groups_share_all_tokens_and_all_of_the_text(show, corpus):  # noqa: F811
    lines = [line for line in show(corpus, "--show", "groups").splitlines() if line.startswith("│")]
    rows = [re.split(r"\s*│\s*", line) for line in lines]
    assert [int(row[1]) for row in rows] == list(range(12))
    assert sum(int(row[2]) for row in rows) == 257
    primes = [int(row[3]) for row in rows]
    assert sum(primes) == 55 and [g for g in range(12) if primes[g]] == [1, 2, 3, 5, 7, 11]
    assert primes[2] == primes[3] == 1
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.6)  # twelve rounded numbers


def test_the_matrix_is_that_of_the_similarities(show, char_corpus):  # noqa: F811
    lines = show(char_corpus, "--show", "matrix", "--count", 20).splitlines()[1:21]
    shown = [line[18:].split() for line in lines]
    for a in range(1, 21):
        assert shown[a - 1][a - 1] == "="
        for b in set(range(1, 21)) - {a}:
            assert abs(int(shown[a - 1][b - 1]) - 100 * similarity(a, b, 0.7, 0.3)) <= 0.5
    shades = show(char_corpus, "--show", "matrix", "--count", 60).splitlines()[:60]
    assert all(line[18 + n] == "@" for n, line in enumerate(shades))


def test_colours_change_no_character(show, corpus, monkeypatch):  # noqa: F811
    for view in (("--count", 25), ("--show", "groups"), ("--show", "matrix"), ("--token", "e")):
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        plain = show(corpus, *view)
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("LINES", "100")  # a terminal's height may bound the spiral
        coloured = show(corpus, *view)
        assert "\x1b" not in plain and (view == ("--show", "groups") or "\x1b" in coloured)
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_a_terminal_without_unicode_is_written_to_all_the_same(corpus, tmp_path):  # noqa: F811
    environment = {"PYTHONIOENCODING": "ascii", "COLUMNS": "80", "PATH": "", "HOME": str(tmp_path)}
    result = command("crystal", corpus, "--count", 9, cwd=tmp_path, env=environment)
    assert result.returncode == 0 and result.stdout.isascii() and "9 numbers" in result.stdout


def test_without_data_the_text_of_the_preset_is_shown(show, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "of 257 tokens" in show("--preset", "minimal", "--count", 9)


# ---- pictures


@pytest.mark.parametrize("suffix", ["png", "svg", "PNG"])
@pytest.mark.parametrize(
    "view",
    [
        ("--count", 25),
        (),
        ("--token", "a"),
        ("--show", "groups"),
        ("--show", "matrix"),
        ("--show=matrix", "--count=12"),
    ],
)
def test_every_view_is_a_picture_too(show, tmp_path, view, suffix):
    folder = made(tmp_path, "a $x$ b_1 ^ \u6f22\u5b57 \t" * 30 + "".join(map(chr, range(0x400, 0x500))))
    out = tmp_path / f"picture.{suffix}"
    assert show(folder, *view, "--out", out) == f"Wrote {out}.\n"
    first = out.read_bytes()
    if suffix == "svg":
        assert b"<svg" in first[:1000] and b"<dc:date>" not in first
        show(folder, *view, "--out", out)
        assert out.read_bytes() == first
    else:
        assert first.startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'cllm-spheres[plots]'" in refusal(corpus, "--out", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_told(corpus, tmp_path):  # noqa: F811
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("a.jpg", "neither in .png nor in .svg"), ("a", "neither"), ("nowhere/a.png", "nowhere is not a folder"),
        ("folder.png", "it is a folder"), ("x" * 300 + ".svg", "File name too long"),
    ):  # fmt: skip
        assert words in refusal(corpus, "--count", 9, "--out", tmp_path / name)


# ---- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--show spirl", "--show cannot be 'spirl': did you mean 'spiral'?"),
        ("--show neighbours", "needs --token"),
        ("--show groups --token e", "--show groups has no use for --token"),
        ("--gcd-weight 1", "--show spiral has no use for --gcd-weight"),
        ("--show groups --ulam-weight 1", "--show groups has no use for --ulam-weight"),
        ("--token 257", "no token 257: the vocabulary has 257 tokens, with ids 0 to 256"),
        (f"--token {'9' * 400}", "the vocabulary has 257 tokens"),
        ("--token abc", r"'abc' is no token of this vocabulary of 257 but 3 of them: a (97) b (98) c (99)"),
        ("--token=", "--token is empty"),
        ("--count 0", "--count 0 is not possible for --show spiral: give 1 to 257"),
        ("--count 258", "--count 258"),
        ("--token e --count 257", "give 1 to 256 with a vocabulary of 257"),
        ("--show matrix --count 150", "150 tokens do not fit 80 columns: give --count 62 or less"),
        ("--token e --gcd-weight nan", "The gcd weight is nan"),
        ("--show matrix --ulam-weight -2", "The ulam weight is -2.0"),
        ("--tokenizer char", "tokenizer byte, and char was given"),
        ("--preset smal", "did you mean 'small'?"),
    ],
)
def test_what_cannot_be_shown_is_told(corpus, words, said, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    assert said in refusal(corpus, *words.split())


def test_a_spiral_that_does_not_fit_names_what_does(corpus, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "9")
    assert "17 wide" in refusal(corpus, "--count", 257) and "--count 81 or less" in refusal(corpus, "--count", 257)


def test_texts_that_no_tokenizer_knows_are_told(tmp_path):
    (tmp_path / "words").mkdir()
    words = made(tmp_path / "words", "one two two\n" * 30, "word")
    assert "'three' is no token of this vocabulary of 4; give one of its tokens, or an id" in refusal(
        words, "--token", "three"
    )
    characters = made(tmp_path, "abc\n" * 30)
    assert "has no 'x'" in refusal(characters, "--token", "xyz")


def test_a_vocabulary_of_one_has_no_neighbours(corpus, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Corpus, "of", classmethod(lambda cls, p: cls(p, np.array([0]), np.array([5]))))
    assert "vocabulary of 1" in refusal(corpus, "--show", "neighbours", "--token", "0")


def test_damaged_data_are_told(corpus, tmp_path):  # noqa: F811
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_of_a_run_its_own_text_is_shown(show, corpus, tmp_path):  # noqa: F811
    train_whole(corpus, tmp_path / "run", steps=1)
    assert show(tmp_path / "run", "--show", "groups") == show(corpus, "--show", "groups")
    assert "is a run, whose text is prepared already: leave --tokenizer" in refusal(
        tmp_path / "run", "--tokenizer", "char"
    )
