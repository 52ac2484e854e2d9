# Written from the test cells of nbs/1_foundations/07_cli.ipynb by `attnbook export`. Do not edit.
import pytest

from attnbook.lab.cli import (
    Check,
    _BareApp,
    _one_line_errors,
    join_parameters,
    run_checks,
    split_parameters,
    split_values,
)


def test_errors_are_one_line(capsys=None):
    @_one_line_errors
    def command(x):
        if x < 0:
            raise ValueError(f"x must be positive,\n not {x}")
        return x
    assert command(3) == 3
    with pytest.raises(SystemExit) as e:
        command(-1)
    assert e.value.code == 2


def test_parameters_of_two_words():
    assert join_parameters(["x", "-p", "a", "-1", "--out", "d", "-p", "b=2"]) == ["x", "-p", "a=-1", "--out", "d", "-p", "b=2"]
    assert split_parameters(["a=-1", "b=x=y"]) == {"a": "-1", "b": "x=y"}
    for bad, words in ((["a"], "name and a value"), (["=1"], "name and a value"), (["a=1", "a=2"], "twice")):
        with pytest.raises(ValueError, match=words):
            split_parameters(bad)


def test_values_of_a_grid():
    assert split_values("1,2") == ["1", "2"] and split_values("a") == ["a"] and split_values("") == [""]
    assert split_values("[1, 2],[3,(4, 5)], x") == ["[1, 2]", "[3,(4, 5)]", "x"]
    with pytest.raises(ValueError, match="-g takes a name and a value, not 'n'"):
        split_parameters(["n"], "-g")


def test_checks():
    missing = Check("GPU", False, "none", "buy one")
    assert str(missing).splitlines() == ["--   GPU            none", f"{'':20}-> buy one"]
    assert str(Check("torch", False, "none", needed=True)).startswith("FAIL") and str(Check("torch", True, "2.13", "x")) == "ok   torch          2.13"
    names = [c.name for c in run_checks()]
    assert names == ["Python", "torch", "GPU", "Triton", "book packages", "Jupyter kernel", "notebooks", "data packages", "cache", "Quarto", "Ray"]


def test_without_typer_there_is_bench():
    bare = _BareApp()
    assert bare.command("x", cls=object)(len) is len
    for words in ([], ["run", "attention"], ["bench"], ["bench", "nowhere"]):
        with pytest.raises(SystemExit) as e:
            bare(words)
        assert e.value.code == 2
