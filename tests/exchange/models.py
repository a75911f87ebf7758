"""Small models of every kind of tokenizer as runs, made without a training; and where the golden folders are."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from cllm_spheres_bench.nasty_texts import nasty_texts

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.model.families import family_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer, train_bpe

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SHAPE = Shape(vocab_size=0, block_size=12, layers=2, heads=2, width=16, ff_width=40)
TEXTS = nasty_texts(300)


def tokenizers() -> dict[str, Tokenizer]:
    """One of each kind, for texts with characters of one to four bytes."""
    characters = "".join(dict.fromkeys("".join(TEXTS[:40]) + "The spheres."))
    words = ["The", "spheres", "turn", "and", "<|endoftext|>", "counts", "12"]
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer(characters),
        "word": WordTokenizer(words),
        "word with <unk>": WordTokenizer([*words, "<unk>"]),
        "bpe": train_bpe(["The spheres turn and turn. Café größer 日本語 don't we'll  12"] * 3, 300),
    }


def weights(shape: Shape, seed: int = 1) -> dict[str, np.ndarray]:
    """Random ones, float32, by name."""
    layout, rng = Layout(shape), np.random.default_rng(seed)
    return layout.views(rng.normal(0, 0.3, layout.size).astype(np.float32))


def make_run(path: Path, tokenizer: Tokenizer, **options) -> dict[str, np.ndarray]:
    """A run with a checkpoint of step 3; its weights."""
    shape = replace(SHAPE, vocab_size=tokenizer.vocab_size, **options)
    model = weights(shape)
    path.mkdir(parents=True)
    tokenizer.save(path / "tokenizer.json")
    state = {"step": 3, "layout": asdict(shape), "total_tokens": 144}
    config = family_of(shape).files.config(shape, tokenizer.eot, 0.0)
    Store(path).save(3, model, {"moments": np.zeros(1, np.float32)}, state, config, path / "tokenizer.json")
    return model


def golden_copy(name: str, place: Path) -> Path:
    """A golden folder that may be changed."""
    return Path(shutil.copytree(GOLDEN / name, place / name))


def change_json(path: Path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
