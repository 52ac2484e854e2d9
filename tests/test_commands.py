"""The command line as a reader types it: in a process of its own, looking at output and exit code."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnbook.lab.book import CHAPTERS
from attnbook.lab.parameters import example_notebook

ROOT = Path(__file__).resolve().parent.parent


def attnbook(*words, cwd=ROOT, **environment):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-m", "attnbook", *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path, **environment})


def refused(*words, **kw):
    """The one line with which bad input is refused."""
    done = attnbook(*words, **kw)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture
def small(tmp_path):
    return example_notebook(tmp_path / "01_small.ipynb")


def test_list_names_every_chapter():
    done = attnbook("list")
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert shown == {c.name: c.status for c in CHAPTERS.values()}


def test_doctor_says_what_to_do():
    done = attnbook("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("Python", "torch", "GPU", "Triton", "Jupyter kernel", "data packages", "cache", "Quarto", "missing"):
        assert what in done.stdout
    assert re.search(r"Triton +\d+\.\d+\S*, runs a kernel", done.stdout), done.stdout


def test_doctor_finds_an_unwritable_cache(small):
    done = attnbook("doctor", ATTNBOOK_CACHE=str(small / "below"))
    assert "-> set ATTNBOOK_CACHE" in done.stdout


def test_no_command_shows_the_help():
    done = attnbook()
    assert "Usage" in done.stdout + done.stderr and "doctor" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["run", "sweep", "bench", "claims"])
def test_unknown_chapter(command):
    assert "did you mean neighborhood?" in refused(command, "neighbourhood")


def test_planned_chapter():
    planned = [c.name for c in CHAPTERS.values() if c.status == "planned"]
    if not planned:
        pytest.skip("every chapter is written")
    assert "planned, not written yet; ready are attention" in refused("run", planned[0])


def test_unknown_parameter(small, tmp_path):
    line = refused("run", small, "-p", "m", "3", "--out", tmp_path / "runs")
    assert "no parameter 'm'" in line and "preset ('smoke' | 'cpu' | 'gpu'), n (int), scale (float)" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, value", [("n", "many"), ("n", "2.5"), ("scale", "big"), ("preset", "tpu")])
def test_ill_typed_parameter(small, tmp_path, name, value):
    line = refused("run", small, "-p", name, value, "--out", tmp_path / "runs")
    assert f"parameter {name} (" in line and repr(value) in line
    assert not (tmp_path / "runs").exists()


def test_parameter_given_twice_or_without_value(small):
    assert "given twice" in refused("run", small, "-p", "n", "1", "-p", "n=2")
    done = attnbook("run", small, "-p")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_unwritable_folder(small):
    """Below a regular file nobody can make a folder, not even root."""
    assert "cannot write to the output folder" in refused("run", small, "--out", small / "runs")


def test_missing_notebook(tmp_path):
    assert "there is no notebook" in refused("run", tmp_path / "none.ipynb")


def test_run_from_any_folder(small, tmp_path):
    """The whole way: a run through papermill with parameters, from a folder that has nothing to do with the book."""
    done = attnbook("run", small, "-p", "n", "101", "-p", "scale=-1", "--out", "runs", "--no-progress", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("small-") and f"page      runs/{folder.name}/small.html" in done.stdout
    assert json.loads((folder / "results" / "small.jsonl").read_text()) == {"name": "sum", "n": 101, "sum": -5050.0}
    page = (folder / "small.html").read_text()
    assert "<mfrac>" in page and "5050" in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    notebook = json.loads((folder / "small.ipynb").read_text())
    assert any("5050" in "".join(o.get("data", {}).get("text/plain", "")) for c in notebook["cells"] for o in c.get("outputs", []))
    assert json.loads((folder / "summary.json").read_text())["parameters"] == {"n": 101, "scale": -1.0, "preset": "cpu"}


def test_run_a_chapter(tmp_path):
    """A chapter of the book itself, as `make demo` runs one."""
    done = attnbook("run", "attention", "--out", tmp_path, "--no-progress", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, = tmp_path.iterdir()
    page = (folder / "attention.html").read_text()
    assert page.count("<math") > 10 and "data:image/png;base64" in page and "$$" not in page
    assert "Traceback" not in page


def test_run_that_fails(tmp_path):
    broken = example_notebook(tmp_path / "broken.ipynb", "1 / 0", "never = 1")
    done = attnbook("run", broken, "--out", tmp_path / "runs", "--no-progress")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "`1 / 0`" in done.stderr and "ZeroDivisionError" in done.stderr
    folder, = (tmp_path / "runs").iterdir()
    assert (folder / "broken.ipynb").is_file() and "ZeroDivisionError" in (folder / "broken.html").read_text()


@pytest.mark.parametrize("missing, words", [("typer", "pip install 'attnbook[book]'"), ("papermill", "pip install 'attnbook[book]'")])
def test_without_the_extra(tmp_path, missing, words):
    """A machine with torch, triton and numpy only gets a sentence, not a traceback."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    done = subprocess.run([sys.executable, "-m", "attnbook", "run", "book"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
