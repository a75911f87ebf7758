"""What the documents say is there: commands run, names and links exist, tables equal the code."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_spheres.config import PRESETS, build, preset_values
from cllm_spheres.events import EVENTS
from cllm_spheres.kernels.bf16 import sizes as sizes_bf16
from cllm_spheres.kernels.sizes import BLOCK
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.program import RECOMPUTE, program
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres.memory import Regions, Sizes
from tests.web.served import Served

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "data").glob("*.md")])
COMMAND = Path(sys.executable).parent / "cllm-spheres"
TIMEOUT_S = 120  # of one command; the slowest compiles the kernels
SHORT = ["--steps", "4", "--eval-tokens", "256"]  # what a document's training is cut to
by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(path), re.DOTALL | re.MULTILINE)


def commands(path):
    """The commands that a document shows, without their comments, as lists of words."""
    typed = [line[2:] for line in joined(blocks(path, "console")) if line.startswith("$ ")]
    split = [shlex.split(line, comments=True) for line in [*typed, *joined(blocks(path, "sh"))]]
    return [words for words in split if words]


def joined(texts):
    """The lines of blocks; one that ends with a backslash goes on in the next."""
    return "".join(texts).replace("\\\n", " ").splitlines()


def codes(path):
    """What stands between single backticks, without the fenced blocks."""
    return re.findall(r"`([^`]+)`", unfenced(path))


def unfenced(path):
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(path), flags=re.DOTALL | re.MULTILINE)


def rows(text):
    """The cells of all table rows in a text, header and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [cells for cells, after in zip(tables, [*tables[1:], [""]], strict=True)
            if not is_rule(cells) and not is_rule(after)]  # fmt: skip


def is_rule(cells):
    return bool(cells) and all(re.fullmatch(":?-+:?", cell) for cell in cells)


def section(path, heading):
    """The text of a document from a heading to the next one of any level."""
    return re.split(r"^#+ ", text_of(path).split(heading + "\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def bare(cell):
    return cell.strip("`")


def number(cell):
    return float(cell.removesuffix("MB").replace(",", ""))


# ---- names


@by_name
def test_relative_links_exist(path):
    links = re.findall(r"\]\(([^)#\s]+)", text_of(path))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@by_name
def test_the_files_that_are_named_exist(path):
    files = {code for code in codes(path) if re.fullmatch(r"[\w./-]+\.(py|md)", code) and code != "__init__.py"}
    missing = [name for name in files if not any((ROOT / top / name).exists() for top in ("", "cllm_spheres"))]
    assert missing == []


@by_name
def test_the_functions_that_are_named_stand_in_the_file_that_is_named(path):
    named = re.findall(r"`([\w.]+)`(?: in|, | \()\s*\(?`([\w/]+\.py)`", text_of(path))
    named += [(b, a) for a, b in re.findall(r"`([\w/]+\.py)`: `(\w+)`", text_of(path))]
    for name, file in named:
        if not name.endswith("py"):
            places = [ROOT / top / file for top in ("", "cllm_spheres") if (ROOT / top / file).exists()]
            assert places, file
            assert re.search(rf"\b{name.split('.')[-1]}\b", text_of(places[0])), f"{file} has no {name}"


@by_name
def test_the_names_of_the_code_are_real(path):
    sources = [*(ROOT / "cllm_spheres").rglob("*.py"), *(ROOT / "cli").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(text_of(source) for source in sources if source != Path(__file__))))
    named = {code for code in codes(path) if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", code) and "_" in code}
    named = {name for name in named if not re.match("X_|num_x", name)}  # patterns of names
    assert sorted(name for name in named if not set(name.split(".")) <= words | {"md", "toml", "jsonl"}) == []


@by_name
def test_the_options_that_are_named_exist(path):
    known, group = {"--help"}, command_line()
    for command in (group, *group.commands.values()):
        for each in (command, *getattr(command, "commands", {}).values()):
            for parameter in each.params:
                known |= {*parameter.opts, *parameter.secondary_opts}
    used = [code for code in codes(path) if not code.startswith("#SBATCH")]
    used += [" ".join(words) for words in commands(path) if words and words[0] == "cllm-spheres"]
    assert {option for code in used for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)} <= known


@by_name
def test_the_make_targets_that_are_named_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for words in [code.split() for code in codes(path)] + commands(path):
        if words and words[0] == "make":
            assert [word for word in words[1:] if "=" not in word and word not in targets] == []


def test_what_the_readme_installs_is_an_extra():
    extras = re.findall(r"'\.\[(\w+)\]'", text_of(README))
    project = text_of(ROOT / "pyproject.toml")
    assert extras and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


# ---- services


@pytest.mark.parametrize(("path", "command"), [("docs/operations.md", "train"), ("docs/serving.md", "serve")])
def test_the_unit_for_systemd_can_be_enabled_as_it_is_printed(tmp_path, path, command):
    (unit,) = blocks(ROOT / path, "ini")
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str
    parsed.read_string(unit)
    service = parsed["Service"]
    assert parsed["Unit"]["Description"] and parsed["Install"]["WantedBy"] == "multi-user.target"
    assert service["User"] == "cllm"
    assert service["Environment"] == f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}"
    words = shlex.split(service["ExecStart"])
    assert words[0] == "/opt/cllm/bin/cllm-spheres" and words[1] == command
    command_line().commands[command].make_context(command, words[2:])  # its options are real
    if shutil.which("systemd-analyze"):
        (tmp_path / "cllm.service").write_text(unit.replace(words[0], shutil.which("true")))
        verify = ["systemd-analyze", "verify", str(tmp_path / "cllm.service")]
        done = subprocess.run(verify, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


# ---- tables


def shape_of(preset):
    config = build(preset_values(preset))
    width, ff_width = config.width, config.ff_width or 4 * config.width
    return config, Shape(config.vocab_size, config.block_size, config.layers, config.heads, width, ff_width)


def test_the_table_of_presets_is_that_of_the_configuration():
    table = {cells[0]: cells[1:] for cells in rows(section(README, "## Presets"))}
    assert list(table) == list(PRESETS)
    for name, cells in table.items():
        config, shape = shape_of(name)
        length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"
        counts = [config.layers, config.heads, config.width, shape.ff_width, config.block_size, config.batch_size]
        counts += [config.spheres, config.vocab_size]
        assert cells == [*(f"{n:,}" for n in counts), length, f"{Layout(shape).num_parameters:,}"]


def test_the_table_of_memory_is_that_of_the_code(monkeypatch):
    monkeypatch.setattr(sizes_bf16, "KEPT_LOGITS", 0)  # what is kept on AVX-512 is said beside the table
    for name, shared, segments, *of_dtypes in rows(section(ROOT / "docs/spheres.md", "## The cost of memory")):
        config, shape = shape_of(name)
        size = Layout(shape).size
        sizes = Sizes(size, config.spheres, 32, has_squares=True)
        largest_shard = -(-config.batch_size // config.spheres)
        arenas = {
            dtype: [
                program(Layout(shape), dtype, largest_shard=largest_shard, recompute=mode).arena_bytes
                for mode in RECOMPUTE
            ]
            for dtype in dtypes.DTYPES
        }
        packed = dtypes.packing(Layout(shape), "bf16").size_bytes
        expected = [Regions(sizes).total, 4 * size * config.spheres, *arenas["fp32"], packed, *arenas["bf16"]]
        actual = [1e6 * number(cell) for cell in (shared, segments, *of_dtypes)]
        assert actual == pytest.approx(expected, rel=5e-3)  # three digits are shown


def test_the_table_of_regions_names_each_one():
    table = rows(section(ROOT / "docs/spheres.md", "## Shared memory"))
    named = re.findall(r"`(\w+)`", "".join(cells[0] for cells in table))
    regions = vars(Regions(Sizes(BLOCK, 1, 1, has_squares=True)))
    assert set(named) == regions.keys() - {"sizes", "stride", "trace_stride", "total"}


def test_the_table_of_events_names_each_one_that_is_written():
    writers = [*(ROOT / "cllm_spheres/training").glob("*.py"), ROOT / "cllm_spheres/spheres/node_zero.py"]
    sources = "".join(map(text_of, writers))
    written = {name for name in EVENTS if f'"{name}"' in sources or re.search(rf"\b{name.upper()}\b", sources)}
    assert written == documented_events().keys()


def documented_events():
    """Event -> the names of its own fields, from the table in operations.md."""
    own = section(ROOT / "docs/operations.md", "## metrics.jsonl").split("Some have fields of their own")[1]
    events = {bare(name): set(re.findall(r"`(\w+)`", fields)) for name, _, fields in rows(own)}
    events["resume"] = events["resume"] - {"start"} | events["start"]
    events["end"] -= {"done", "early_stop", "stop_at", "asked", "signal"}  # values of `reason`
    return events


def documented_fields(kind):
    """The fields of a kind of record, from its table in operations.md."""
    text = section(ROOT / "docs/operations.md", "## metrics.jsonl").split(f'`kind` is `"{kind}"`')[1]
    return {bare(cells[0]) for cells in rows(re.split(r"`kind` is |Some have", text)[0]) if cells[0] != "field"}


# ---- code

LANGUAGES = {"console", "sh", "python", "ini", "text"}  # ini: the units for systemd, above; text: what was printed
NOT_RUN = {
    "make": "installs, or runs all tests",
    "pip": "installs",
    "useradd": "needs root",
    "systemctl": "needs root and systemd",
    "srun": "needs Slurm",
    "docker": "needs an image",
    "cllm-spheres scale": "needs a run that goes on: tests/training/test_scale.py",
}
PYTHON_NEEDS = {"docs/models.md": "transformers"}  # which `make test` does not install: `make conformance` does
PYTHON_CUTS = {  # what makes a document's training short
    "README.md": {
        "workers=2)": "workers=2, steps=4, eval_tokens=256)",
        "quiet=True,": "quiet=True, steps=4, eval_tokens=256,",
    }
}
PYTHON_CHECKS = {
    "README.md": "assert loss > 0 and logits.shape[0] == 3 and gradients.keys() == model.parameters.keys()",
    "docs/crystal.md": "assert abs(y - np.tanh(np.linspace(-3, 3, 1000))).max() < 1e-15 and z == 2**0.5",
    "data/README.md": "assert len(ids) > 1000 and ids.max() < 4096",
}
TRAIN_BOOKS = ["cllm-spheres", "train", "books/", "--run", "runs/books"]


@by_name
def test_all_code_stands_in_blocks_that_are_run(path):
    fences = re.findall(r"^```(.*)", text_of(path), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES and set(fences[1::2]) <= {""}
    known = "|".join(command_line().commands)
    code = rf"^    (?:\$ )?(?:cllm-spheres (?:{known})\b|import |from \w+ import).*"
    indented = re.findall(code, unfenced(path), re.MULTILINE)
    assert indented == []


def command_line():
    """The command `cllm-spheres` as click knows it."""
    from cllm_spheres_cli.app import app
    from typer.main import get_command

    return get_command(app)


def reason_against(words):
    """Why a command is not run, else None."""
    return NOT_RUN.get(words[0]) or NOT_RUN.get(" ".join(words[:2]))


def has_code(path):
    """Whether something of a document is run."""
    return bool(blocks(path, "python")) or not all(map(reason_against, commands(path)))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of its own for prepared text; the compiled kernels are the user's."""
    from cllm_spheres.crystal.jit import CACHE_FOLDER

    cache = tmp_path_factory.mktemp("cache")
    if CACHE_FOLDER.parent.name == "kernels":
        (cache / "cllm-spheres").mkdir()
        (cache / "cllm-spheres/kernels").symlink_to(CACHE_FOLDER.parent)
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with what the documents speak of: books/, which are these documents, and notes.txt."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "books").mkdir()
    for path in DOCUMENTS:
        shutil.copy(path, folder / "books" / path.relative_to(ROOT).as_posix().replace("/", "-"))
    (folder / "notes.txt").write_text("A note.\n" * 100)
    return folder


@pytest.fixture(scope="module")
def trained(library, environment):
    """The library with runs/books, by the command that most documents begin with: it is run once for all of them."""
    run([*TRAIN_BOOKS, *SHORT], library, environment)
    return library


@pytest.fixture
def folder(library, tmp_path):
    """A working folder with the texts of the library."""
    shutil.copytree(library, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    return tmp_path


def run(words, cwd, environment):
    """A command in a process of its own."""
    words = [str(COMMAND), *words[1:]] if words[0] == "cllm-spheres" else words
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def run_all(words_of_all, python, cwd, environment):
    """Commands, then Python code, in one process; what it printed."""
    order = json.dumps({"commands": words_of_all, "python": python})
    words = [sys.executable, str(ROOT / "tests/documents.py")]
    done = subprocess.run(
        words, input=order, cwd=cwd, env=environment, capture_output=True, text=True, timeout=10 * TIMEOUT_S
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def shortened(words):
    """A command that ends soon; a training of the smallest preset stays as it is."""
    if words[:3] == ["cllm-spheres", "bench", "faults"]:
        return [*words, "--preset", "minimal", "--steps", "2000", "--kills", "2"]
    if words[:2] != ["cllm-spheres", "train"] or "minimal" in words:
        return words
    if "--resume" in words:
        return [*words, "--steps", "6"] if "--steps" in words else words
    return [*words, *SHORT]


@by_name
def test_commands_that_are_not_run_are_spelled_right(path):
    for words in commands(path):
        if reason_against(words) and "cllm-spheres" in words:
            name, *rest = words[words.index("cllm-spheres") + 1 :]
            command_line().commands[name].make_context(name, rest)


@pytest.mark.slow
@pytest.mark.parametrize("path", list(filter(has_code, DOCUMENTS)), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_runs(path, folder, trained, environment):
    todo = [words for words in commands(path) if not reason_against(words)]
    serves = [words for words in todo if words[:2] == ["cllm-spheres", "serve"] and "--help" not in words]
    if TRAIN_BOOKS in todo or serves:
        shutil.copytree(trained / "runs", folder / "runs")
    todo = [shortened(words) for words in todo if words != TRAIN_BOOKS and words not in serves]
    python = python_of(path)
    if not serves:
        run_all(todo, python, folder, environment)
        return
    ((_, _, model),) = serves
    with Served([folder / model], env=environment) as served:
        todo = [[word.replace("http://127.0.0.1:8000", served.url) for word in words] for words in todo]
        assert any(served.url in word for words in todo for word in words), "nothing asks the server"
        said = run_all(todo, python.replace("http://127.0.0.1:8000", served.url), folder, environment)
        assert "error" not in said
    assert served.process.returncode == 128 + signal.SIGTERM, served.err


def python_of(path):
    """The Python of a document, its trainings cut short; nothing where it cannot be run here."""
    name = path.relative_to(ROOT).as_posix()
    python = "\n".join(blocks(path, "python"))
    compile(python, name, "exec")
    for long, short in PYTHON_CUTS.get(name, {}).items():
        assert long in python
        python = python.replace(long, short)
    if name in PYTHON_NEEDS and importlib.util.find_spec(PYTHON_NEEDS[name]) is None:
        return ""
    return python + "\n" + PYTHON_CHECKS.get(name, "")


@pytest.mark.slow
def test_a_run_writes_the_fields_that_are_documented(folder, environment):
    train = shlex.split("cllm-spheres train --preset minimal --run run --plain --eval-every 20 --steps 60 --stop-at 50")
    # one slow step makes it last longer than the second after which the spheres are sampled
    resume = shlex.split("cllm-spheres train --resume --run run --steps 70")
    run_all([[*train, "--fault", "gather:30:1:slow"], resume], "", folder, environment)
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for kind in ("step", "eval", "spheres"):
        found = {frozenset(record) for record in records if record["kind"] == kind}
        documented = documented_fields(kind)
        packs = any("pack_s" in record for record in records)  # not every dtype does
        assert found == {frozenset(documented if packs else documented - {"pack_s"})}, kind
    seen, own = set(), documented_events()
    for record in records:
        if record["kind"] == "event":
            seen.add(record["event"])
            assert record.keys() == documented_fields("event") | own[record["event"]], record["event"]
    assert seen >= {"start", "ready", "eta", "saved", "best", "resume", "replan", "end"}
