"""Imports point one way; the package is light; no file names a folder of the machine it was written on."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom to the top: a module imports from lower levels, and from its own folder.
LEVELS = [
    {"caches", "errors", "config", "events", "faults", "limits", "machine", "title", "units"},
    {"crystal"},
    {"kernels", "text"},
    {"model"},
    {"checkpoint"},
    {"exchange"},
    {"spheres"},
    {"training"},
    {"doctor"},
    {"inference"},
    {"watch"},
    {"crawl", "web"},
    {"api", "__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
WITHIN_A_LEVEL = {
    ("caches", "limits"), ("config", "errors"), ("faults", "errors"), ("limits", "errors"), ("limits", "machine"),
    ("limits", "units"), ("machine", "errors"), ("__init__", "api"),
}  # fmt: skip
HEAVY = ("numba", "llvmlite", "rich", "typer", "pydantic", "tokenizers", "scipy_openblas32", "psutil", "gguf")


def part_of(path):
    """The name in LEVELS of a source file."""
    if path.is_relative_to(ROOT / "cli"):
        return "cli"
    inside = path.relative_to(ROOT / "cllm_spheres")
    return inside.parts[0].removesuffix(".py")


def part_of_import(module):
    """The name in LEVELS of an imported module; None where it is not ours. Other names stand in __init__."""
    top, _, rest = module.partition(".")
    if top == "cllm_spheres_cli":
        return "cli"
    if top != "cllm_spheres":
        return None
    name = rest.partition(".")[0]
    return name if name in LEVEL else "__init__"


def imports_of(source):
    """(line, module) of every import, those inside of functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module == "cllm_spheres":
                yield from ((node.lineno, f"cllm_spheres.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def name_of(path):
    """The name under which a source file is imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return re.sub(r"^cli\b", "cllm_spheres_cli", name)


def a_circle(sources_by_module):
    """Modules that import one another in a circle, those inside of functions and for type checkers too; else []."""
    graph = {}
    for name, source in sources_by_module.items():
        imported = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= (inner & sources_by_module.keys()) or {node.module}
        graph[name] = imported & sources_by_module.keys()
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def may_import(importer, imported):
    return importer == imported or (importer, imported) in WITHIN_A_LEVEL or LEVEL[imported] < LEVEL[importer]


def sources():
    return sorted([*(ROOT / "cllm_spheres").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def test_every_folder_has_its_level():
    assert {part_of(path) for path in sources()} <= LEVEL.keys()


def test_imports_point_down():
    wrong = []
    for path in sources():
        importer = part_of(path)
        for line, module in imports_of(path.read_text(encoding="utf-8")):
            imported = part_of_import(module)
            if imported and not may_import(importer, imported):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another_in_a_circle():
    assert a_circle({name_of(path): path.read_text(encoding="utf-8") for path in sources()}) == []
    assert set(a_circle({"p.a": "from p import b", "p.b": "def f():\n    from p.a import x"})) == {"p.a", "p.b"}


def test_the_rule_itself():
    assert may_import("model", "text") and may_import("text", "crystal") and may_import("config", "errors")
    assert not may_import("kernels", "text") and not may_import("text", "kernels")
    assert not may_import("crystal", "text") and not may_import("errors", "config")
    assert not may_import("kernels", "model") and not may_import("api", "cli")
    assert list(imports_of("def f():\n    from cllm_spheres import api")) == [(2, "cllm_spheres.api")]


def test_only_the_command_bench_imports_the_benchmarks_and_nothing_the_tests():
    users = set()
    for path in sources():
        tops = {module.partition(".")[0] for _, module in imports_of(path.read_text(encoding="utf-8"))}
        assert not tops & {"tests", "bench", "prototype", "pytest", "hypothesis"}, path
        if "cllm_spheres_bench" in tops:
            users.add(path.relative_to(ROOT).as_posix())
    assert users == {"cli/bench.py"}


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, cllm_spheres; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_a_folder_of_somebodys_machine():
    place = re.compile(r"(?<![\w.~}])/(?:home|root|work|Users)/[\w.]")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    wrong = []
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        lines = content.decode("utf-8", "replace").splitlines()
        wrong += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if place.search(line)]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_the_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "cllm_spheres").rglob("__init__.py")}
    ours = {name for name in listed if name.partition(".")[0] == "cllm_spheres"}
    assert {".".join(folder.parts) for folder in folders} == ours
