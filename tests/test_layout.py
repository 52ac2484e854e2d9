"""What must agree between files that no notebook holds."""
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from attnbook.lab.book import CHAPTERS
from attnbook.lab.export import notebooks

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
READY = [c for c in CHAPTERS.values() if c.status == "ready"]


def test_settings_and_pyproject_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    assert PROJECT["name"] == settings["lib_name"] and PROJECT["description"] == settings["description"]
    assert PROJECT["requires-python"] == f">={settings['min_python']}"
    for text in ((ROOT / "attnbook" / "__init__.py").read_text(), (ROOT / "CITATION.cff").read_text()):
        assert re.search(rf"""version(__ =|:) "?{re.escape(settings['version'])}\b""", text)


def test_every_direct_dependency_has_a_tested_version():
    name = lambda line: re.match(r"[\w.-]+", line)[0].lower()
    constraints = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    extras = PROJECT["optional-dependencies"]
    assert {name(line) for line in [*PROJECT["dependencies"], *extras["book"], *extras["dev"]]} <= constraints


def test_data_packages_agree():
    from attnbook.lab.data import DATA_PACKAGES
    lines = [line for line in (ROOT / "requirements-data.txt").read_text().splitlines() if line and line[0] != "#"]
    assert sorted(lines) == sorted(DATA_PACKAGES.values())


def test_book_lists_the_notebooks_there_are():
    text = (ROOT / "_quarto.yml").read_text()
    listed = re.findall(r"^\s+- (\S+\.ipynb)$", text, re.M)
    nbs = ROOT / "nbs"
    assert sorted(listed) == sorted(p.relative_to(nbs).as_posix() for p in notebooks(ROOT))
    order = [c.notebook.removeprefix("nbs/") for c in READY]
    assert [p for p in listed if p != "index.ipynb"] == order, "the chapters stand in another order than in the registry"
    assert (nbs / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_every_notebook_is_registered():
    known = {c.notebook for c in CHAPTERS.values()} | {"nbs/index.ipynb"}
    assert {p.relative_to(ROOT).as_posix() for p in notebooks(ROOT)} <= known


@pytest.mark.parametrize("chapter", READY, ids=lambda c: c.name)
def test_chapter_has_the_agreed_form(chapter):
    cells = json.loads(chapter.path.read_text())["cells"]
    first, sources = "".join(cells[0]["source"]), ["".join(c["source"]) for c in cells]
    assert re.match(rf"# {re.escape(chapter.title)}\n\n> \S.*", first), "the notebook begins with its title and a promise"
    rooms = [m[1] for s in sources if (m := re.match(r"#\| default_exp (\S+)", s))]
    assert rooms and rooms[0] == chapter.module.removeprefix("attnbook."), "the first room is the chapter's own"
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", "an error is stored in the notebook"
    if chapter.paper:
        assert [c for c in cells if "parameters" in c["metadata"].get("tags", [])], "no cell is tagged parameters"


@pytest.mark.parametrize("chapter", [c for c in READY if c.name != "cli"], ids=lambda c: c.name)
def test_import_needs_torch_triton_numpy_only(chapter):
    """The modules import where only the library's own requirements are installed."""
    extras = ["IPython", "ipykernel", "jupyter_client", "latex2mathml", "matplotlib", "nbclient", "nbconvert", "nbformat", "nbdev", "fastcore", "execnb",
              "pandas", "papermill", "pyarrow", "pytest", "rich", "scipy", "skimage", "sklearn", "tqdm", "typer", "einops", "yaml", "mlxtend", "music21"]
    code = f"import sys\nfor m in {extras}: sys.modules[m] = None\nimport {chapter.module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
