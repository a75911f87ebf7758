"""A tokenizer as Hugging Face keeps it -> our tokenizer.json with the same ids, or an InputError that says why not.

Read are a byte-level BPE in tokenizer.json, or vocab.json with merges.txt as GPT-2 came. What adds tokens around a
text, pads or cuts it changes no id of the text itself and is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cllm_spheres.errors import InputError, shown
from cllm_spheres.text.folder import read_regular
from cllm_spheres.text.tokenizer import BYTE_OF, EOT, BpeTokenizer

FILE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
FILE_BYTES = 256 << 20  # the largest known have about 20 MB
ADDS_AROUND = (None, "ByteLevel", "TemplateProcessing")  # kinds of post-processor that leave the text's own ids alone
MOST_NAMES = 5  # in one message


def read_tokenizer(folder: Path) -> str:
    """The text of a tokenizer.json of our own kind bpe. InputError where the folder's cannot be one."""
    record = _record(folder)
    where = folder / FILE if (folder / FILE).exists() else folder / VOCAB
    _check(record, where)
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        library = LibraryTokenizer.from_str(json.dumps(record))
        tokenizer = BpeTokenizer(library)
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{where} is no tokenizer: {shown(str(error))}.") from None
    return tokenizer.library.to_str(pretty=True)


def _record(folder: Path) -> dict[str, Any]:
    """The tokenizer in the form of the library's tokenizer.json, without what adds, pads and cuts."""
    if (folder / FILE).exists():
        record = _json(folder / FILE)
        post_processor = record.get("post_processor")
        if post_processor is not None and (
            not isinstance(post_processor, dict) or post_processor.get("type") not in ADDS_AROUND
        ):
            raise InputError(f"{folder / FILE} has a post_processor {shown(post_processor)}, which is not known here.")
        return record | {"post_processor": None, "truncation": None, "padding": None}
    if not (folder / VOCAB).exists() or not (folder / MERGES).exists():
        raise InputError(
            f"{folder} has no tokenizer: neither {FILE} nor {VOCAB} with {MERGES}. Save it there with transformers:"
            " tokenizer.save_pretrained."
        )
    vocab = _json(folder / VOCAB)
    merges = [line for line in _text(folder / MERGES).split("\n") if line and not line.startswith("#version")]
    if EOT not in vocab:
        vocab[EOT] = len(vocab)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": vocab[EOT], "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip


def _check(record: dict[str, Any], where: Path) -> None:
    """InputError for what is no byte-level BPE, or one whose ids ours would not be. Empties what has no effect."""
    model = record.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise InputError(f"{where} is a tokenizer of kind {shown(kind)}: only a byte-level BPE can be imported.")
    vocab, normalizer = model.get("vocab"), record.get("normalizer")
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise InputError(f"{where} has no vocabulary of tokens and whole numbers.")
    if normalizer is not None:
        raise InputError(
            f"{where} changes texts before they are split (normalizer {shown(normalizer)}): not known here."
        )
    splitter = record.get("pre_tokenizer")
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    found = {"use_regex": True, **splitter} if isinstance(splitter, dict) else {}
    if any(found.get(key) != value for key, value in wanted.items()):
        raise InputError(
            f"{where} splits texts with {shown(splitter)}: only GPT-2's ByteLevel with add_prefix_space false and"
            " use_regex true can be imported."
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise InputError(f"{where} has {name} {shown(model[name])}: not known here.")
    absent = [byte for character, byte in BYTE_OF.items() if character not in vocab]
    if absent:
        raise InputError(
            f"{where} has no token for {len(absent)} of the 256 bytes (the first is {absent[0]}): texts that hold them"
            " would lose them."
        )
    model["unk_token"] = None  # nothing is unknown where every byte has a token
    added = record.get("added_tokens")
    if not isinstance(added, list) or not all(map(_is_added, added)):
        raise InputError(f"{where} has added_tokens {shown(added)}.")
    if plain := [a["content"] for a in added if a.get("special") is not True]:
        raise InputError(
            f"{where} has {len(plain)} added tokens that are found in texts: {_names(plain)}. Only special ones, which"
            f" stand for no text, can be imported."
        )
    if EOT not in (a["content"] for a in added):
        names = _names([a["content"] for a in added]) or "none"
        raise InputError(f"{where} has no special token {EOT} to end a text with; its special tokens: {names}.")
    ids = sorted({**vocab, **{a["content"]: a["id"] for a in added}}.values())
    if set(ids) != set(range(len(ids))):
        raise InputError(f"{where} has {len(ids):,} tokens whose ids are not 0 to {len(ids) - 1:,}, each once.")


def _is_added(token: object) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(shown, names[:MOST_NAMES])) + rest


def _text(path: Path) -> str:
    try:
        return read_regular(path, FILE_BYTES).decode()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}.") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON: {shown(str(error))}.") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is no JSON object.")
    return record
