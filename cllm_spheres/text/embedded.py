"""The running Python -> the text that is always there: its standard library; and the minimal text."""

from __future__ import annotations

import importlib
import os
import platform
import sysconfig
from pathlib import Path

from cllm_spheres.errors import InputError
from cllm_spheres.text.files import FileList

_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def embedded_files() -> FileList:
    """The .py files of the standard library in sorted order, without tests and site-packages.

    InputError where this Python comes without its sources.
    """
    found = FileList()
    top = sysconfig.get_path("stdlib")
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.access(path, os.R_OK):
                found.add(path, os.stat(path))
    if not found.paths:
        raise InputError(f"This Python has no sources in {top}: name a file or a folder of text.")
    return found


def embedded_name() -> str:
    """What the embedded corpus is called in a manifest."""
    return f"the standard library of Python {platform.python_version()}"


def minimal_text() -> Path:
    """The path of minimal.txt: three lines of our own, for the smallest run."""
    data = importlib.import_module("cllm_spheres_data")  # importlib.resources fails on it when editable
    for folder in data.__path__:
        if (path := Path(folder) / "minimal.txt").is_file():
            return path
    raise InputError("The installation is damaged: it has no minimal.txt. Install cllm-spheres again.")
