"""python -m cllm_spheres_bench.conformance --llama FOLDER [--golden tests/golden] [--out FOLDER]

Export and import against transformers and llama.cpp -> conformance.md; exits 1 where something differs by more than
its limit. `make conformance` calls it in a virtual environment that has torch and transformers, which nothing else
here needs. A difference is the largest absolute one of logits.
"""

# T positions, V vocabulary

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cllm_spheres_bench.golden import CASES, make_golden
from cllm_spheres_bench.llama import Llama, load_library
from cllm_spheres_bench.machine import facts, installed, markdown, results_folder
from cllm_spheres_bench.nasty_texts import nasty_texts

import cllm_spheres as cs
from cllm_spheres.exchange.export import TARGET_DTYPES, export
from cllm_spheres.exchange.importing import import_model

NUM_RANDOM_TEXTS = 3000
SEQUENCES = 4  # of a comparison of logits
GREEDY = 64
PROMPTS = ("def ", "import ", "The ", "class Error", "    return ", "# ")
LIMIT = 1e-4  # what is promised; two orders below what a wrong weight, shape or formula gives
# Rounding a weight of size w moves it by at most w * 2**-11 (f16) or w * 2**-8 (bf16); the logits here are sums of
# about a hundred such errors of both signs. llama.cpp also rounds what it multiplies with to the weights' dtype.
# A weight of q8_0 or q4_0 moves by up to half a step, of which the largest weight of its block has 127 or 8.
LIMITS = {"f32": LIMIT, "f16": 0.05, "bf16": 0.5, "q8_0": 0.2, "q4_0": 2.0}
KINDS = {
    "byte": dict(tokenizer="byte", layers=2),
    "char": dict(tokenizer="char", layers=2, bias=False),
    "word": dict(tokenizer="word", layers=2, ff_width=200),
    "bpe": dict(tokenizer="bpe", layers=3, dropout=0.1),
}


@dataclass
class Row:
    """One comparison: what, what came out, what it may be at most."""

    what: str
    value: float | str
    limit: float | str

    @property
    def good(self) -> bool:
        return self.value == self.limit if isinstance(self.limit, str) else float(self.value) <= self.limit

    def cells(self) -> list[str]:
        value = self.value if isinstance(self.value, str) else f"{self.value:.2e}"
        return [
            self.what,
            value,
            self.limit if isinstance(self.limit, str) else f"{self.limit:g}",
            "yes" if self.good else "**no**",
        ]


def main() -> None:
    """Make all models, compare, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="a folder with llama.cpp's library")
    parser.add_argument("--golden", type=Path, help="make the golden model folders here, for the ordinary tests")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    library = load_library(arguments.llama)
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place + "/cache"
        golden = arguments.golden or Path(place) / "golden"
        make_golden(golden)
        rows = [*_kinds(Path(place), library), *_greedy(Path(place), library), *_imports(Path(place), golden)]
    command = shlex.join(["python", "-m", "cllm_spheres_bench.conformance", *sys.argv[1:]])
    folder = results_folder(arguments.out)
    (folder / "conformance.md").write_text(_report(rows, command))
    print((folder / "conformance.md").read_text())
    sys.exit(not all(row.good for row in rows))


def _report(rows: list[Row], command: str) -> str:
    about = facts(command)
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "tokenizers", "gguf"))
    return (
        "# Export and import against transformers and llama.cpp\n\n"
        f"{about['machine']}, commit {about['commit']}, {about['date']}. {versions}; llama.cpp of node-llama-cpp.\n"
        f"`{about['command']}`\n\n"
        "A difference is the largest absolute one of all logits of all positions; ids and texts"
        " are equal, or counted.\n\n" + markdown(["what", "found", "limit", "good"], (row.cells() for row in rows))
    )


# ---- export


def _train(place: Path, name: str, **options: Any) -> cs.Run:
    return cs.train(run=place / name, quiet=True, dtype="fp32", seed=3, **options)


def _corpus(place: Path) -> Path:
    """Text with characters of one to four bytes."""
    path = place / "corpus.txt"
    if not path.exists():
        plain = [text for text in nasty_texts(40) if "\0" not in text]
        lines = "The spheres turn; one counts, twelve compute. Café, größer, 日本語, 😀!\n" * 200
        path.write_text(lines + "\n".join(plain) + "\n", encoding="utf-8")
    return path


def _kinds(place: Path, library: Any) -> Iterator[Row]:
    """Each kind of tokenizer: ids, texts and logits, in both targets and each dtype."""
    for kind, options in KINDS.items():
        size = dict(heads=4, width=64, block_size=64, batch_size=4, spheres=4, workers=2, steps=60, lr=3e-3)
        run = _train(place, kind, data=_corpus(place), **(size | options))
        model = run.load("last")
        texts = nasty_texts(NUM_RANDOM_TEXTS)
        if kind == "char":  # characters that are not in the vocabulary are an error, here and there
            known = set(model.tokenizer.characters)  # type: ignore[attr-defined]
            texts += ["".join(c for c in text if c in known) for text in texts]
        for dtype in TARGET_DTYPES["gguf"]:
            if dtype in TARGET_DTYPES["hf"]:
                folder = place / f"{kind}-{dtype}"
                export(run.path, "hf", folder, dtype=dtype, which="last")
                yield from _transformers(kind, dtype, folder, model, texts)
            if kind != "word":
                file = place / f"{kind}-{dtype}.gguf"
                export(run.path, "gguf", file, dtype=dtype, which="last")
                yield from _llama(kind, dtype, file, model, texts, library)


def _transformers(kind: str, dtype: str, folder: Path, model: cs.Model, texts: list[str]) -> Iterator[Row]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if dtype == "f32":
        tokenizer, ours = AutoTokenizer.from_pretrained(folder), model.tokenizer
        ids, decoded, refused = [], [], 0
        for text in texts:
            try:
                expected = ours.encode(text)
            except cs.InputError:
                expected = None
            try:
                found = tokenizer(text).input_ids
            except Exception:  # the library raises bare Exception
                found, refused = None, refused + 1
            ids.append(found == expected)
            if expected is not None:
                decoded.append(tokenizer.decode(expected) == ours.decode(expected))
        yield Row(
            f"{kind}, transformers: ids of {len(texts):,} texts{f', {refused:,} refused by both' if refused else ''}",
            _count(ids),
            "all equal",
        )
        rng = np.random.default_rng(5)
        for _ in range(1000):  # ids that no text gives too
            some = rng.integers(0, model.shape.vocab_size, 20).tolist()
            decoded.append(tokenizer.decode(some, skip_special_tokens=True) == ours.decode(some))
        yield Row(f"{kind}, transformers: texts of {len(decoded):,} lists of ids", _count(decoded), "all equal")
    difference = 0.0
    for ids_T in _sequences(model):
        with torch.no_grad():
            logits_TV = theirs(torch.from_numpy(ids_T)[None]).logits[0].numpy()
        difference = max(difference, float(np.abs(logits_TV - model.logits(ids_T)).max()))
    yield Row(f"{kind}, transformers: logits, {dtype}", difference, LIMITS[dtype])


def _llama(kind: str, dtype: str, file: Path, model: cs.Model, texts: list[str], library: Any) -> Iterator[Row]:
    llama = Llama(library, file, model.shape.block_size)
    if dtype == "f32":
        assigned, others = [], []  # which new characters are letters, each library's tables know or not
        known = ["".join(c for c in text if not _is_unassigned(c)) for text in texts]
        for text in dict.fromkeys(texts + known):
            if "\0" not in text:
                try:
                    equal = llama.tokenize(text) == model.tokenizer.encode(text)
                except cs.InputError:
                    continue  # llama.cpp leaves out what it has no token for
                (others if any(map(_is_unassigned, text)) else assigned).append(equal)
        yield Row(f"{kind}, llama.cpp: ids of {len(assigned):,} texts", _count(assigned), "all equal")
        if others:
            share = others.count(False) / len(others)
            what = f"ids of {len(others):,} texts with characters that Unicode {unicodedata.unidata_version} lacks"
            yield Row(f"{kind}, llama.cpp: {what}, share that differs", share, 0.05)
    differences = [np.abs(llama.logits(ids_T.tolist()) - model.logits(ids_T)).max() for ids_T in _sequences(model)]
    yield Row(f"{kind}, llama.cpp: logits, {dtype}", float(max(differences)), LIMITS[dtype] if dtype != "f32" else 1e-2)
    llama.close()


def _sequences(model: cs.Model) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(9)
    for _ in range(SEQUENCES):
        yield rng.integers(0, model.shape.vocab_size, model.shape.block_size)


def _is_unassigned(character: str) -> bool:
    return unicodedata.category(character) == "Cn"


def _count(equal: list[bool]) -> str:
    return "all equal" if all(equal) else f"{equal.count(False):,} of {len(equal):,} differ"


# ---- generation


def _greedy(place: Path, library: Any) -> Iterator[Row]:
    """A trained model writes the same tokens everywhere."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = _train(place, "trained", preset="small", block_size=128, steps=400, workers=2)
    model = run.load("last")
    export(run.path, "hf", place / "trained-hf", which="last")
    export(run.path, "gguf", place / "trained.gguf", which="last")
    theirs = AutoModelForCausalLM.from_pretrained(place / "trained-hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "trained-hf")
    llama = Llama(library, place / "trained.gguf", model.shape.block_size)
    by_llama, by_transformers = [], []
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        assert ids == llama.tokenize(prompt) == tokenizer(prompt).input_ids
        ours = list(ids)
        for _ in range(GREEDY):
            ours.append(int(model.logits(ours)[-1].argmax()))
        by_llama.append(list(llama.greedy(ids, GREEDY)) == ours[len(ids) :])
        written = theirs.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=GREEDY,
            eos_token_id=-1,
        )  # fmt: skip
        by_transformers.append(written[0].tolist() == ours)
    llama.close()
    loss = run.metrics("eval")[-1]["val_loss"]
    what = f"small, 400 steps, validation loss {loss:.2f}: {GREEDY} greedy tokens after {len(PROMPTS)} prompts"
    yield Row(f"{what}, llama.cpp", _count(by_llama), "all equal")
    yield Row(f"{what}, transformers", _count(by_transformers), "all equal")


# ---- import


def _imports(place: Path, golden: Path) -> Iterator[Row]:
    """transformers' own models: imported, and exported again."""
    import torch
    from transformers import AutoModelForCausalLM

    for name in CASES:
        expected = np.load(golden / name / "expected.npz")
        run = place / f"imported-{name}"
        import_model(golden / name, run)
        model = cs.load(run)
        kept = model.shape.vocab_size
        difference = np.abs(model.logits(expected["ids_T"]) - expected["logits_TV"][:, :kept]).max()
        yield Row(f"import of {name}: logits", float(difference), LIMIT)
        export(run, "hf", place / f"again-{name}")
        again = AutoModelForCausalLM.from_pretrained(place / f"again-{name}", dtype=torch.float32).eval()
        with torch.no_grad():
            logits_TV = again(torch.from_numpy(expected["ids_T"])[None]).logits[0].numpy()
        same = np.array_equal(logits_TV, expected["logits_TV"][:, :kept])
        largest = float(np.abs(logits_TV - expected["logits_TV"][:, :kept]).max())
        yield Row(f"import of {name} and export: logits in transformers", 0.0 if same else largest, 1e-6)


if __name__ == "__main__":
    main()
