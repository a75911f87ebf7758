"""A GGUF file -> its token ids and logits as llama.cpp computes them, through the C interface of its library.

The library is the one inside the npm package @node-llama-cpp/linux-x64; `make conformance` fetches it. Parameter
structures are filled by the library itself and passed on; only fields at their beginning are changed here, so that
their length need not be known.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from cllm_spheres.errors import InputError

PARAMETER_BYTES = 1024  # more than any version's structures have
# Of llama_context_params, counted in 32-bit words: n_ctx, n_batch and n_ubatch come first, then
THREADS = 7  # threads for one token and for many, 4 each by default
CACHE_TYPES = 26  # dtypes of keys and values, float16 each by default
F32, F16 = 0, 1  # of ggml_type


class _Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * PARAMETER_BYTES)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


class Llama:
    """One model in llama.cpp, with a float32 cache."""

    def __init__(self, library: ctypes.CDLL, model: Path, length: int, threads: int = 1) -> None:
        """length: of the longest sequence."""
        self._library = library
        parameters = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(str(model).encode(), parameters)
        if not self._model:
            raise InputError(f"llama.cpp does not load {model}.")
        self._vocab = library.llama_model_get_vocab(self._model)
        self.vocab_size = library.llama_vocab_n_tokens(self._vocab)
        self._parameters = library.llama_context_default_params()
        view = np.frombuffer(self._parameters, np.int32)
        view[:3] = length  # n_ctx, n_batch, n_ubatch
        of_threads, of_cache = view[THREADS : THREADS + 2], view[CACHE_TYPES : CACHE_TYPES + 2]
        if (*of_threads, *of_cache) != (4, 4, F16, F16):
            raise InputError("This version of llama.cpp has other parameters than the one this was written for.")
        of_threads[:], of_cache[:] = threads, F32

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text that is only text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        assert count >= 0, count
        return list(ids[:count])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: after each token of a sequence, in one pass."""
        context = self._library.llama_init_from_model(self._model, self._parameters)
        assert context, "no context"
        try:
            self._decode(context, ids, all_rows=True)
            rows = [self._row(context, i) for i in range(len(ids))]
        finally:
            self._library.llama_free(context)
        return np.stack(rows)

    def greedy(self, ids: Sequence[int], count: int) -> Generator[int, None, None]:
        """The `count` likeliest tokens after a prompt, one by one with the cache."""
        context = self._library.llama_init_from_model(self._model, self._parameters)
        assert context, "no context"
        try:
            pending = list(ids)
            for _ in range(count):
                self._decode(context, pending, all_rows=False)
                pending = [int(self._row(context, -1).argmax())]
                yield from pending
        finally:
            self._library.llama_free(context)

    def _decode(self, context: int, ids: Sequence[int], all_rows: bool) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        wanted = (ctypes.c_int8 * len(ids))(*([1] * len(ids)))
        batch = _Batch(len(ids), tokens, None, None, None, None, wanted if all_rows else None)
        code = self._library.llama_decode(context, batch)
        assert code == 0, code

    def _row(self, context: int, i: int) -> np.ndarray:
        row = self._library.llama_get_logits_ith(context, i)
        return np.ctypeslib.as_array(row, (self.vocab_size,)).copy()

    def close(self) -> None:
        self._library.llama_model_free(self._model)


def load_library(folder: Path) -> ctypes.CDLL:
    """llama.cpp's library in a folder of the npm package. InputError where it is not there."""
    found = sorted(folder.rglob("libllama.*so*"))
    if not found:
        raise InputError(f"There is no libllama in {folder}: see `make conformance`.")
    place = found[0].parent
    for name in ("libggml-base*.so*", "libggml.*so*"):
        ctypes.CDLL(str(next(iter(sorted(place.glob(name))))), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(iter(sorted(place.glob("libggml.*so*"))))), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(place).encode())
    library = ctypes.CDLL(str(found[0]))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    ids = ctypes.POINTER(ctypes.c_int32)
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_default_params", _Parameters, []),
        ("llama_context_default_params", _Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
        ("llama_model_free", None, [pointer]),
        ("llama_init_from_model", pointer, [pointer, _Parameters]),
        ("llama_free", None, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, ids, number, flag, flag]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    log = ctypes.CFUNCTYPE(None, number, ctypes.c_char_p, pointer)
    library._quiet = log(lambda level, text, data: None)
    library.llama_log_set(library._quiet, None)
    library.llama_backend_init()
    return library
