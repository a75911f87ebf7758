"""Texts that tokenizers get wrong -> a list: white space of all kinds, scripts, joined and unassigned characters."""

from __future__ import annotations

import random

_PLAIN = [
    "", "a", " ", "  a  b ", "The quick brown fox.", "don't I'LL we've 's 'S ''t",
    "x=1;y=[2,3]#4\n\tdef f():\n        pass\n", "\t\n\r\n\r\x0b\x0c", "a\x1cb\x1dc\x1ed\x1fe",
    "\x85\xa0x\u1680y\u2003\u2028z\u2029\u202fw\u205f\u3000", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>",
    "<unk> <|endoftext|> </s> [UNK] <s>", "caf\xe9 cafe\u0301 \xdf \u0130i \u01c5 \ufb01",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002", "\u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22", "\xbd \xb2 \u2167 \u2460 12\u066345",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "a" * 300, " " * 70, "\n" * 33,
    "a \n b\n\n\n  c   \n", "\u200b\ufeff\x00\x01\x7f\xad", "\ufffd\ufffe\uffff", "\U0010ffff\U000e0001\ue000",
    "\u0378\u0380 \U0001fbff",
]  # fmt: skip
_RANGES = (
    (0x20, 0x7F), (0x20, 0x7F), (0x00, 0x20), (0xA0, 0x250), (0x250, 0x800), (0x800, 0x2000), (0x2000, 0x2070),
    (0x2070, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000),
)  # fmt: skip


def nasty_texts(num_random: int = 500, seed: int = 1) -> list[str]:
    """The known traps, then random characters from all of Unicode; the same for the same numbers."""
    rng = random.Random(seed)
    made = [
        "".join(chr(rng.randrange(*rng.choice(_RANGES))) for _ in range(rng.randrange(1, 60)))
        for _ in range(num_random)
    ]
    return [*_PLAIN, *made]
