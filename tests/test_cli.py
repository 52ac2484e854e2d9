# Written from the test cells of nbs/1_foundations/07_cli.ipynb by `attnbook export`. Do not edit.
import re
import shutil

import pytest

from attnbook.lab.book import book_root
from attnbook.lab.cli import (
    Check,
    _BareApp,
    _one_line_errors,
    join_parameters,
    new_chapter,
    run_checks,
    split_parameters,
    split_values,
    write_book_list,
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


def test_a_chapter_begins(tmp_path):
    (tmp_path / "nbs").mkdir()
    for file in ("_quarto.yml", "nbs/_chapter.ipynb"):
        shutil.copy(book_root() / file, tmp_path / file)
    for name in ("hyperzzw", "van", "ulsam"):
        path = new_chapter(name, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "nbs/5_vision/ulsam.ipynb" and "# Subspace attention" in text and "arXiv 2006.15102" in text
    assert "#| default_exp ulsam.kernels" in text and not re.search("__[A-Z]+__", text)
    listed = (tmp_path / "_quarto.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- (?:part: )?(.*)", listed.split("format:")[0].split("chapters:", 1)[1], re.M) == [
        "index.ipynb", "Locality", "3_locality/van.ipynb", "Vision", "5_vision/ulsam.ipynb", "5_vision/hyperzzw.ipynb"]
    for name, words in (("ulsam", "is there already: nbs/5_vision/ulsam.ipynb"), ("vna", "unknown chapter 'vna'"), ("engine", "is a foundation")):
        with pytest.raises(ValueError, match=words):
            new_chapter(name, tmp_path)

def test_list_of_the_book_is_in_order(tmp_path):
    root = book_root()
    (tmp_path / "nbs").symlink_to(root / "nbs")
    shutil.copy(root / "_quarto.yml", tmp_path / "_quarto.yml")
    write_book_list(tmp_path)
    assert (tmp_path / "_quarto.yml").read_text(encoding="utf-8") == (root / "_quarto.yml").read_text(encoding="utf-8")


def test_without_typer_there_is_bench():
    bare = _BareApp()
    assert bare.command("x", cls=object)(len) is len
    for words in ([], ["run", "attention"], ["bench"], ["bench", "nowhere"]):
        with pytest.raises(SystemExit) as e:
            bare(words)
        assert e.value.code == 2
