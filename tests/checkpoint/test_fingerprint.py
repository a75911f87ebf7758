"""What differs between two fingerprints is said, all of it, and nothing else."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.checkpoint.fingerprint import differences

values = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["1", "b", ""]) | st.lists(st.text(max_size=2))
fingerprints = st.dictionaries(
    st.sampled_from(["a", "b", "a.b"]),
    st.recursive(values, lambda inner: st.dictionaries(st.sampled_from("ab"), inner), max_leaves=4),
)


def test_differences_are_said_in_words():
    old = {
        "numba": "0.61.0", "dtype": "fp32", "blas": {"version": "0.3.29", "core": "SkylakeX"}, "flush": True,
        "cpu": ["avx2", "avx512f", "fma"], "arithmetic": 1, "gone": None,
    }  # fmt: skip
    new = {
        "numba": "0.62.1", "dtype": "fp32", "blas": {"version": "0.3.29", "core": "Haswell"}, "flush": False,
        "cpu": ["avx2", "fma", "amx"], "arithmetic": "1", "mkl": "2026.2",
    }  # fmt: skip
    assert differences(old, new) == [
        'arithmetic 1 -> "1"',
        "blas.core SkylakeX -> Haswell",
        "cpu -avx512f +amx",
        "flush true -> false",
        "gone null -> absent",
        "mkl absent -> 2026.2",
        "numba 0.61.0 -> 0.62.1",
    ]


def test_a_fingerprint_that_was_on_disk_does_not_differ():
    fingerprint = {"cpu": ("avx2", "fma"), "blas": {"version": "0.3.29"}, "nothing": {}}
    assert differences(json.loads(json.dumps(fingerprint)), fingerprint) == []


@given(old=fingerprints, new=fingerprints)
def test_nothing_is_said_exactly_where_both_are_equal(old, new):
    assert (differences(old, new) == []) == (json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True))
    assert differences(old, old) == []
    assert all(differences(old, new)) and len(differences(old, new)) == len(differences(new, old))
