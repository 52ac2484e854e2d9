# Written from the test cells of nbs/1_foundations/07_cli.ipynb by `attnbook export`. Do not edit.
# fmt: off
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import pytest

import attnbook
from attnbook.lab.book import CHAPTERS, Chapter, book_root
from attnbook.lab.cli import (
    Application,
    _argument,
    _one_line_errors,
    _option,
    app,
    join_parameters,
    new_chapter,
    split_parameters,
    split_values,
    write_book_list,
)
from attnbook.lab.doctor import Check, book_packages, check_book, run_checks, runs_on, version_note


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
    assert join_parameters(["x", "-p", "a", "-1", "--out", "d", "-p", "b=2"]) == [
        "x",
        "-p",
        "a=-1",
        "--out",
        "d",
        "-p",
        "b=2",
    ]
    assert split_parameters(["a=-1", "b=x=y"]) == {"a": "-1", "b": "x=y"}
    for bad, words in ((["a"], "name and a value"), (["=1"], "name and a value"), (["a=1", "a=2"], "twice")):
        with pytest.raises(ValueError, match=words):
            split_parameters(bad)


def test_values_of_a_grid():
    assert split_values("1,2") == ["1", "2"] and split_values("a") == ["a"] and split_values("") == [""]
    assert split_values("[1, 2],[3,(4, 5)], x") == ["[1, 2]", "[3,(4, 5)]", "x"]
    with pytest.raises(ValueError, match="-g takes a name and a value, not 'n'"):
        split_parameters(["n"], "-g")


def test_options_are_read_from_signatures(capsys):
    app, seen = Application("What it is."), []

    @app.command(words=join_parameters)
    def go(
        chapter: Annotated[str, _argument(metavar="CHAPTER", help="its name")],
        other: Annotated[Path | None, _argument(help="a file")] = None,
        parameter: Annotated[list[str], _option("-p", "--parameter", help="one")] = [],
        n: Annotated[int | None, _option(help="how many")] = None,
        progress: Annotated[bool, _option(help="a bar")] = True,
        check: Annotated[bool, _option("--check", help="look only")] = False,
    ):
        "Does it. And more."
        seen.append((chapter, other, parameter, n, progress, check))

    app(["go", "x"])
    app(["go", "x", "y", "-p", "a", "-1", "--parameter", "b=2", "--n", "3", "--no-progress", "--check"])
    assert seen == [("x", None, [], None, True, False), ("x", Path("y"), ["a=-1", "b=2"], 3, False, True)]
    for words, said in (
        (["go"], "required: CHAPTER"),
        (["go", "x", "--n", "y"], "invalid int value"),
        (["come"], "invalid choice: 'come'"),
        (["go", "x", "--chec"], "unrecognized"),
    ):
        with pytest.raises(SystemExit) as e:
            app(words)
        assert (
            e.value.code == 2
            and said in (line := capsys.readouterr().err)
            and line.count("\n") == 1
            and line.startswith("error: ")
        )
    for words, code, said in (
        ([], 2, "Does it"),
        (["--version"], 0, f"attnbook {attnbook.__version__}"),
        (["go", "--help"], 0, "--progress, --no-progress"),
    ):
        with pytest.raises(SystemExit) as e:
            app(words)
        assert e.value.code == code and said in capsys.readouterr().out


def test_versions_that_were_not_tested_are_named():
    assert version_note("torch", "2.13.0+cpu") == "2.13.0+cpu" and version_note("triton", "3.8.0") == "3.8.0"
    assert version_note("torch", "2.15.0") == "2.15.0, newer than what was tested (2.11 to 2.14)" and version_note(
        "Python", "3.14.1"
    ).endswith("(3.11 to 3.13)")


def test_what_is_known_of_a_gpu():
    assert (
        "measured" in runs_on(9, 0)
        and "every test" in runs_on(8, 0)
        and runs_on(12, 0) == runs_on(10, 0) != runs_on(8, 9)
        and "too old" in runs_on(7, 5)
    )


def test_missing_packages_are_named(monkeypatch):
    assert {"papermill", "pytest", "jupyterlab"} <= set(book_packages()) and check_book().ok
    monkeypatch.setattr(sys.modules[check_book.__module__], "book_packages", lambda: ["pip", "no-such-package"])
    assert not check_book().ok and check_book().found == "missing: no-such-package"


def test_checks():
    missing = Check("GPU", False, "none", "buy one")
    assert str(missing).splitlines() == ["--   GPU            none", f"{'':20}-> buy one"]
    assert (
        str(Check("torch", False, "none", needed=True)).startswith("FAIL")
        and str(Check("torch", True, "2.13", "x")) == "ok   torch          2.13"
    )
    names = [c.name for c in run_checks()]
    assert names == [
        "Python",
        "torch",
        "GPU",
        "Triton",
        "book packages",
        "Jupyter kernel",
        "notebooks",
        "data packages",
        "cache",
        "Quarto",
        "Ray",
    ]


def test_a_chapter_begins(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    for file in ("_quarto.yml", "nbs/_chapter.ipynb"):
        shutil.copy(book_root() / file, tmp_path / file)
    for name, part in (("dawn", "3_locality"), ("dusk", "5_vision"), ("night", "7_looking_inside")):
        monkeypatch.setitem(CHAPTERS, name, Chapter(name, part, name.title(), f"A et al., {name}, arXiv 2101.00001"))
    planned = [CHAPTERS[name] for name in ("dawn", "dusk", "night")]
    assert {c.status for c in planned} == {"planned"}
    for c in reversed(planned):
        path = new_chapter(c.name, tmp_path)
    text, c = path.read_text(encoding="utf-8"), planned[0]
    assert path == tmp_path / c.notebook and f"# {c.title}" in text and re.search(r"arXiv [\d.]+", c.paper)[0] in text
    assert f"#| default_exp {c.name}.kernels" in text and not re.search("__[A-Z]+__", text)
    listed = (tmp_path / "_quarto.yml").read_text(encoding="utf-8")
    found = re.findall(r"^ +- (\S+\.ipynb)$", listed.split("format:")[0].split("chapters:", 1)[1], re.M)
    assert found == ["index.ipynb", *(c.notebook.removeprefix("nbs/") for c in planned)]
    for name, words in (
        (c.name, f"is there already: {c.notebook}"),
        ("vna", "unknown chapter 'vna'"),
        ("engine", "is a foundation"),
    ):
        with pytest.raises(ValueError, match=words):
            new_chapter(name, tmp_path)


def test_list_of_the_book_is_in_order(tmp_path):
    root = book_root()
    (tmp_path / "nbs").symlink_to(root / "nbs")
    shutil.copy(root / "_quarto.yml", tmp_path / "_quarto.yml")
    write_book_list(tmp_path)
    assert (tmp_path / "_quarto.yml").read_text(encoding="utf-8") == (root / "_quarto.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["run", "sweep", "bench", "claims"])
def test_chapters_that_are_not_there(command, monkeypatch, capsys):
    monkeypatch.setitem(CHAPTERS, "dusk", Chapter("dusk", "5_vision", "Dusk", "A et al., Dusk, arXiv 2101.00001"))
    for name, words in (
        ("neighbourhood", "did you mean neighborhood?"),
        ("dusk", "planned, not written yet; ready are attention"),
    ):
        with pytest.raises(SystemExit) as e:
            app([command, name])
        assert e.value.code == 2 and words in capsys.readouterr().err
