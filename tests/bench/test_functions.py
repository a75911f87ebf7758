"""The measurement of the elementary functions: its references, its command, and that it goes on where it stopped."""

from __future__ import annotations

import decimal
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cllm_spheres_bench import functions, functions_accuracy, functions_reference, functions_speed
from cllm_spheres_bench.functions_report import report

D = decimal.Decimal


def exact(x):
    return D(float(x))


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def gelu(x):
    from cllm_spheres.crystal.functions.reals import pi, root

    twice = 2 * root(2 / pi())
    u = D(twice.numerator) / D(twice.denominator) * (x + D("0.044715") * x**3)
    return x / (1 + (-u).exp())


EXACT = {
    "exp": lambda x: x.exp(), "log": lambda x: x.ln(), "sigmoid": sigmoid, "gelu": gelu,
    "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1), "sqrt": lambda x: x.sqrt(), "rsqrt": lambda x: 1 / x.sqrt(),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_reference_is_right_to_a_thousandth_of_an_ulp(name):
    x = functions_accuracy.sample(name, 3, 300)
    x = np.abs(x) if name in ("log", "sqrt", "rsqrt") else x
    x = x[(np.abs(x) > 1e-12) & (np.abs(x) < 1e12)]
    high, low = functions_reference.pairs(name, x)
    checked = 0
    with decimal.localcontext(prec=60):
        for i in np.flatnonzero((np.abs(high) > 1e-300) & np.isfinite(high)):
            error = exact(high[i]) * (1 + exact(low[i])) - EXACT[name](exact(x[i]))
            assert abs(error) <= D(np.spacing(abs(high[i]))) / 1000, x[i]
            checked += 1
    assert checked > 100


def test_the_reference_of_pow_is_right():
    x, y = functions_accuracy.sample_pow(np.float64, 3, 200)
    high, low = functions_reference.pairs("pow", x, y)
    with decimal.localcontext(prec=80):
        for i in np.flatnonzero((high > 1e-300) & np.isfinite(high) & (x > 0)):
            error = exact(high[i]) * (1 + exact(low[i])) - (exact(y[i]) * exact(x[i]).ln()).exp()
            assert abs(error) <= D(np.spacing(high[i])) / 1000, (x[i], y[i])


def test_the_reference_of_erf_is_right():
    x = np.linspace(-6.5, 6.5, 301)
    high, low = functions_reference.pairs("erf", x)
    for value, a, b in zip(x, high, low, strict=True):
        k, square = 0, Fraction(float(value)) ** 2
        term = Fraction(float(value))
        with decimal.localcontext(prec=60):
            # 2/sqrt(pi) sum of (-1)**k x**(2k+1) / (k! (2k+1)): its terms grow to e**(x*x), so 60 digits
            s = D(term.numerator) / D(term.denominator)
            z = D(square.numerator) / D(square.denominator)
            total = D(0)
            while abs(s) > D(10) ** -45 or k < 60:
                total += s / (2 * k + 1)
                k += 1
                s = -s * z / k
            expected = total * 2 / D("3.14159265358979323846264338327950288419716939937510582097494459").sqrt()
        if value:
            assert abs(exact(a) * (1 + exact(b)) - expected) <= D(np.spacing(abs(a))) / 10, value


@pytest.mark.skipif(not functions_reference.is_wide(), reason="long double has no more digits than float64 here")
def test_the_reference_of_angles_is_the_standard_librarys_rounded():
    x = functions_accuracy.sample("sin", 3, 400)
    x = x[np.isfinite(x)]
    for name in ("sin", "cos"):
        high, low = functions_reference.pairs(name, x)
        expected = np.array([getattr(math, name)(value) for value in x])
        normal = np.abs(expected) > 1e-300
        assert (np.abs(high - expected) <= np.spacing(np.abs(expected)))[normal].all() and np.abs(low).max() <= 2.0**-53


def measured(folder, *arguments):
    code = functions.main([*arguments, "--samples", "20000", "--kind", "float64", "--out", str(folder)])
    return code, json.loads((folder / "functions.json").read_text())


def test_errors_are_measured_once_and_stay(tmp_path, capsys):
    code, first = measured(tmp_path, "exp", "--only", "errors")
    assert code == 0 and list(first["accuracy"]) == ["float64 exp"]
    found = first["accuracy"]["float64 exp"]
    assert 0.5 < found["ulp"] < 0.8 and found["wrong"] == 0 and found["count"] > 20_000 and not found["exhaustive"]
    code, second = measured(tmp_path, "exp", "erf", "--only", "errors")
    assert code == 0 and second["accuracy"]["float64 exp"] == found and "float64 erf" in second["accuracy"]
    text = (tmp_path / "functions.md").read_text()
    assert "| exp, float64 | **" in text and "| erf, float64 | **" in text
    assert "float64 erf" in capsys.readouterr().err


def test_speed_is_measured_beside_numpy(monkeypatch):
    rates = functions_speed.rates("float32", "exp", None, seconds=0.001, repeats=2)
    assert set(rates) == {"ours", "numpy"} and rates["ours"]["median"] > 0
    assert set(functions_speed.ways("float64", "pow", None)) == {"ours", "numpy"}
    assert set(functions_speed.ways("float64", "gelu", None)) == {"ours"}
    text = report({"facts": {}, "accuracy": {}, "speed": {"float32 exp": rates}})
    assert "| exp, float32 |" in text and "–" in text  # torch's column stays empty


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["expp"], "There is no function expp"),
        (["exp", "--processes", "0"], "--processes 0"),
        (["exp", "--samples", "1"], "--samples 1"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path, capsys, arguments, said):
    assert functions.main([*arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    (tmp_path / "functions.json").write_text("[]")
    assert functions.main(["exp", "--out", str(tmp_path)]) == 2
    assert "is not a result of this benchmark" in capsys.readouterr().err


def test_the_table_of_the_document_is_that_of_the_results():
    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "bench/results/functions.json").read_text())
    text = (root / "docs/crystal.md").read_text().split("## Functions\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    found = {cells[0]: cells[1:] for cells in rows if len(cells) == 9}
    assert set(found) == set(functions.ALL)
    for name, cells in found.items():
        errors = [result["accuracy"][f"{kind} {name}"] for kind in ("float32", "float64")]
        assert all(error["wrong"] == 0 for error in errors)
        assert cells[:2] == [f"{math.ceil(error['ulp'] * 100 - 1e-9) / 100:.2f}" for error in errors]
        for kind, rates in (("float32", cells[2:5]), ("float64", cells[5:8])):
            speed = result["speed"][f"{kind} {name}"]
            expected = [f"{speed[side]['median']:.2f}" if side in speed else "–" for side in ("ours", "numpy", "torch")]
            assert rates == expected, name
