"""A chapter that `attnbook new` has just begun exports, runs and passes its tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnbook.lab.book import Chapter

ROOT = Path(__file__).resolve().parent.parent
PLANNED = Chapter("dusk", "7_looking_inside", "Dusk", "A et al., Dusk, 2021, arXiv 2101.00001")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    copy = tmp_path_factory.mktemp("new") / "attnbook"
    shutil.copytree(
        ROOT,
        copy,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".*", "_proc", "_docs", "runs", "build", "dist", "results", "__pycache__", "*.egg-info"
        ),
    )
    for notebook in (copy / "nbs").glob("[3-9]_*/*.ipynb"):  # one chapter is enough beside the foundations
        if notebook.stem != "halo":
            notebook.unlink()
    last, line = "| Luo, Analyzing Character", f"{PLANNED.part} | {PLANNED.name} | {PLANNED.title} | {PLANNED.paper}"
    notebook = json.loads((copy / "nbs/1_foundations/05_book.ipynb").read_text())
    for c in notebook["cells"]:
        c["source"] = [part for s in c["source"] for part in ([s, line + "\n"] if last in s else [s])]
    (copy / "nbs/1_foundations/05_book.ipynb").write_text(json.dumps(notebook, indent=1) + "\n")
    module = (copy / "attnbook/lab/book.py").read_text().splitlines(keepends=True)
    module = [part for s in module for part in ([s, line + "\n"] if last in s else [s])]
    (copy / "attnbook/lab/book.py").write_text("".join(module))
    return copy


def run(checkout, *words):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout), "ATTNBOOK_RESULTS": str(checkout / "runs"), "IN_TEST": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_new_chapter(checkout):
    pytest.importorskip("nbdev")
    name = PLANNED.name
    began = (
        "from attnbook.lab.cli import new; from attnbook.lab.export import export_modules, export_tests; "
        "from nbdev.config import add_init, get_config; "
        f"new({name!r}), export_modules(), add_init(get_config().lib_path), export_tests()"
    )
    assert PLANNED.notebook in run(checkout, "-c", began)
    rooms = {p.stem for p in (checkout / "attnbook" / name).glob("*.py")}
    assert (
        rooms == {"__init__", "reference", "kernels", "op", "nets", "study"}
        and (checkout / "tests" / f"compile_{name}.py").is_file()
    )
    run(checkout, "-m", "nbdev.test", "--n_workers", "1", "--path", PLANNED.notebook)
    run(
        checkout,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        f"tests/test_{name}.py",
        "tests/test_laws.py",
        "tests/test_layout.py",
        "-k",
        f"{name} and not test_operation and not import_needs",
    )
    assert (checkout / "runs" / f"{name}.jsonl").is_file()


def test_stock_export_stops(checkout):
    """nbdev_export, typed out of habit, complains before it writes anything."""
    pytest.importorskip("nbdev")
    state = lambda: {p: p.read_bytes() for p in sorted((checkout / "attnbook").rglob("*.py"))}
    before = state()
    done = subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert done.returncode and "run_attnbook_export_instead_of_nbdev_export" in done.stderr, done.stderr[-2000:]
    assert state() == before
