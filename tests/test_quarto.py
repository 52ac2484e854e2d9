"""The site's notebooks can be processed: the part of `make book` that needs no Quarto."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnbook.lab.export import notebooks

ROOT = Path(__file__).resolve().parent.parent
PROCESS = """
import json, pathlib, sys
import nbdev.serve_drv
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults
failed = {}
for path in nbglob("nbs", func=pathlib.Path):
    made = "_proc" / path.relative_to("nbs")
    made.parent.mkdir(parents=True, exist_ok=True)
    try:
        nbdev.serve_drv.main((path.resolve(), made, FilterDefaults))
    except Exception as e:
        failed[path.name] = f"{type(e).__name__}: {e}" + (f" ({e.__cause__!r})" if e.__cause__ else "")
print(json.dumps(failed))
"""


def test_notebooks_are_processed(tmp_path):
    """nbdev runs imports and exported cells in a fresh shell and documents what they define. It runs the whole of a cell with an import in it; and something must
    follow the last exported cell."""
    pytest.importorskip("nbdev")
    copy = tmp_path / "attnbook"
    for name in ("attnbook", "nbs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in ("settings.ini", "_quarto.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    (tmp_path / "process.py").write_text(PROCESS)
    done = subprocess.run([sys.executable, "-W", "ignore", str(tmp_path / "process.py")], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(copy)})
    assert done.returncode == 0, done.stderr[-3000:]
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}: {e}" for name, e in failed.items())
    made = {p.relative_to(copy / "_proc").as_posix() for p in (copy / "_proc").rglob("*.ipynb")}
    assert made == {p.relative_to(ROOT / "nbs").as_posix() for p in notebooks(ROOT)}
    page = json.loads((copy / "_proc" / "1_foundations" / "05_book.ipynb").read_text())
    assert any("run_chapter" in "".join(o.get("data", {}).get("text/markdown", "")) for c in page["cells"] for o in c.get("outputs", []))
