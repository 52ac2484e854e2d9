"""The command line as a reader types it: in a process of its own, looking at output and exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hiding import hidden_env

from attnbook.lab.book import CHAPTERS
from attnbook.lab.parameters import example_notebook

ROOT = Path(__file__).resolve().parent.parent


def attnbook(*words, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "attnbook", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


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
    pytest.importorskip("papermill")
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
    assert done.returncode == 2 and done.stdout.startswith("usage: attnbook") and "doctor" in done.stdout


def test_unknown_chapter():
    assert "did you mean neighborhood?" in refused("bench", "neighbourhood")


def test_claims_of_a_chapter_and_of_a_foundation():
    """The book's rows, with where they come from; a foundation claims nothing, also one that has a function of that name."""
    done = attnbook("claims", "halo", CUDA_VISIBLE_DEVICES="", ATTNBOOK_RESULTS=os.devnull + "/none")
    assert (
        done.returncode == 0
        and "| claim | paper |" in done.stdout
        and re.search(r"^measured on: .*, preset \w+", done.stdout, re.M)
    ), done.stderr
    for name in ("cli", "engine"):
        done = attnbook("claims", name)
        assert done.returncode == 0 and "no claims" in done.stdout, done.stderr


def test_benchmarks_that_need_a_gpu(tmp_path):
    """They say so, and leave nothing."""
    line = refused("bench", "halo", CUDA_VISIBLE_DEVICES="", ATTNBOOK_RESULTS=str(tmp_path / "results"))
    assert "the benchmarks of halo need a GPU, and torch sees none here" in line and not (tmp_path / "results").exists()
    done = attnbook("bench", "checks")
    assert done.returncode == 0 and "checks has no benchmarks" in done.stdout


def test_experiments_without_a_notebook(tmp_path):
    """Rows of the experiment that was asked for, as they are recorded; what is not there is refused before anything runs."""
    where = dict(CUDA_VISIBLE_DEVICES="", ATTNBOOK_RESULTS=str(tmp_path / "results"))
    smoke = ("experiments", "van", "--preset", "smoke", "-p", "seed", "3")
    assert "only must be one of 'reach', 'gate', 'fit', not 'art'" in refused(*smoke, "--only", "art", **where)
    assert "no parameter 'sed' (did you mean 'seed'?)" in refused("experiments", "van", "-p", "sed", "3", **where)
    assert not (tmp_path / "results").exists()
    done = attnbook(*smoke, "--only", "gate", **where)
    rows = [json.loads(line) for line in (tmp_path / "results" / "van.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and f"{len(rows)} rows in" in done.stdout.splitlines()[-1], done.stderr
    assert rows and {(r["name"], r["preset"]) for r in rows} == {("gate", "smoke")} and min(r["run"] for r in rows) == 3


def test_unknown_parameter(small, tmp_path):
    line = refused("run", small, "-p", "m", "3", "--out", tmp_path / "runs")
    assert "no parameter 'm'" in line and "preset ('smoke' | 'cpu' | 'gpu'), n (int, >= 0), scale (float)" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name, value", [("n", "many"), ("n", "2.5"), ("n", "-1"), ("scale", "big"), ("preset", "laptop")]
)
def test_ill_parameter(small, tmp_path, name, value):
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
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("small-") and f"page      runs/{folder.name}/small.html" in done.stdout
    assert json.loads((folder / "results" / "small.jsonl").read_text()) == {"name": "sum", "n": 101, "sum": -5050.0}
    page = (folder / "small.html").read_text()
    assert "<mfrac>" in page and "5050" in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    notebook = json.loads((folder / "small.ipynb").read_text())
    assert any(
        "5050" in "".join(o.get("data", {}).get("text/plain", ""))
        for c in notebook["cells"]
        for o in c.get("outputs", [])
    )
    assert json.loads((folder / "summary.json").read_text())["parameters"] == {"n": 101, "scale": -1.0, "preset": "cpu"}


def test_run_a_chapter(tmp_path):
    """A chapter of the book itself, as `make demo` runs one, where only `pip install '.[book]'` and the data packages are there. Its verdicts are its own."""
    pytest.importorskip("papermill")
    done = attnbook(
        "run",
        "cca",
        "--preset",
        "smoke",
        "--out",
        tmp_path / "runs",
        "--no-progress",
        cwd=tmp_path,
        **hidden_env(tmp_path / "site", "book", data=True),
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    page = (folder / "cca.html").read_text()
    assert page.count("<math") > 10 and "data:image/png;base64" in page and "$$" not in page
    assert "Traceback" not in page
    summary = json.loads((folder / "summary.json").read_text())
    judged = [c["verdict"] for c in summary["claims"]]
    assert (
        judged
        and sum(summary["stored"].values()) == len(judged)
        and judged.count("not measured") > summary["stored"].get("not measured", 0)
    )
    assert re.search(r"claims +by the rows of this run, .*not measured: \d+", done.stdout) and re.search(
        r"by those stored with the book, .*\(.*preset gpu", done.stdout
    )


def test_run_that_fails(tmp_path):
    pytest.importorskip("papermill")
    broken = example_notebook(tmp_path / "broken.ipynb", "1 / 0", "never = 1")
    done = attnbook("run", broken, "--out", tmp_path / "runs", "--no-progress")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "`1 / 0`" in done.stderr and "ZeroDivisionError" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "broken.ipynb").is_file() and "ZeroDivisionError" in (folder / "broken.html").read_text()


def test_stopped(tmp_path):
    """Ctrl-C ends a run; its rows, its notebook and a summary are there."""
    pytest.importorskip("papermill")
    slow = example_notebook(
        tmp_path / "slow.ipynb", "import time\npathlib.Path(os.environ['STOP_TEST'], 'slow').touch()\ntime.sleep(600)"
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "attnbook", "run", str(slow), "--out", str(tmp_path / "runs"), "--no-progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STOP_TEST": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell starts background jobs with SIGINT ignored
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "slow").exists():
            assert run.poll() is None and time.monotonic() < end, run.communicate()
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    (folder,) = (tmp_path / "runs").iterdir()
    assert (
        run.returncode == 130
        and f"stopped; what was done until now is in {folder} (1 row in small.jsonl)" in said
        and "Traceback" not in said
    )
    assert json.loads((folder / "summary.json").read_text())["error"] == "stopped"
    assert (folder / "slow.ipynb").is_file() and (folder / "results" / "small.jsonl").read_text()


def test_without_the_extra(tmp_path):
    """A machine with torch, triton and numpy only: what needs no more works, the rest gets a sentence, not a traceback."""
    env = hidden_env(tmp_path / "site")
    done = attnbook("run", "attention", cwd=tmp_path, **env)
    assert done.returncode == 2 and "pip install 'attnbook[book]'" in done.stderr and "Traceback" not in done.stderr
    done = attnbook("sweep", "attention", "-g", "seed=1", cwd=tmp_path, **env)
    assert done.returncode == 2 and "pip install 'attnbook[ray]'" in done.stderr and "Traceback" not in done.stderr
    for words, said in (
        (["--version"], "attnbook "),
        (["list"], "Foundations"),
        (["bench", "checks"], "no benchmarks"),
        (["doctor"], "missing: ipykernel"),
    ):
        done = attnbook(*words, cwd=tmp_path, **env)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
