"""What must agree between files that no notebook holds."""

import ast
import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from hiding import hidden_env, modules_of, packages_of

from attnbook.lab import doctor
from attnbook.lab.book import CHAPTERS, PRESET_NAMES
from attnbook.lab.claims import VERDICTS, chapter_claims
from attnbook.lab.export import notebooks
from attnbook.lab.parameters import read_parameters
from attnbook.lab.results import rows_from

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
        assert re.search(rf"""version(__ =|:) "?{re.escape(settings["version"])}\b""", text)


def test_every_direct_dependency_has_a_tested_version():
    name = lambda line: re.match(r"[\w.-]+", line)[0].lower()
    constraints = {
        name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    }
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
    assert [p for p in listed if p != "index.ipynb"] == order, (
        "the chapters stand in another order than in the registry"
    )
    assert (nbs / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_every_notebook_is_registered():
    known = {c.notebook for c in CHAPTERS.values()} | {"nbs/index.ipynb"}
    assert {p.relative_to(ROOT).as_posix() for p in notebooks(ROOT)} <= known


@pytest.mark.parametrize("chapter", READY, ids=lambda c: c.name)
def test_chapter_has_the_agreed_form(chapter):
    cells = json.loads(chapter.path.read_text())["cells"]
    first, sources = "".join(cells[0]["source"]), ["".join(c["source"]) for c in cells]
    assert re.match(rf"# {re.escape(chapter.title)}\n\n> \S.*", first), (
        "the notebook begins with its title and a promise"
    )
    rooms = [m[1] for s in sources if (m := re.match(r"#\| default_exp (\S+)", s))]
    assert rooms and rooms[0] == chapter.module.removeprefix("attnbook."), "the first room is the chapter's own"
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", "an error is stored in the notebook"
    if chapter.paper:
        assert [c for c in cells if "parameters" in c["metadata"].get("tags", [])], "no cell is tagged parameters"


IMPORT_ALL = """
import importlib, json, pkgutil, sys
import torch, triton
base, failed, heavy = set(sys.modules), {}, {}
import attnbook
names = ["attnbook." + c for c in CHAPTERS] + [m.name for m in pkgutil.walk_packages(attnbook.__path__, "attnbook.") if not m.name.endswith(("_modidx", "__main__"))]
for name in names:
    try:
        importlib.import_module(name)
    except Exception as e:
        failed[name] = f"{type(e).__name__}: {e}"
    for m in ("torch._dynamo", "torch._inductor", "sympy"):
        if m in sys.modules and m not in base:
            heavy.setdefault(m, name)
print(json.dumps([attnbook.__file__, len(names), failed, heavy]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of this checkout, and what setuptools makes of it: an sdist, and a wheel laid out as an installer does."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    shutil.copytree(
        ROOT,
        copy,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".git*",
            ".venv",
            ".*_cache",
            "runs",
            "_proc",
            "_docs",
            "build",
            "dist",
            "*.egg-info",
            "__pycache__",
            ".ipynb_checkpoints",
        ),
    )
    files = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    code = (
        "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sdist, wheel = next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder / "installed")
    with tarfile.open(sdist) as t:
        packed = {name.partition("/")[2] for name in t.getnames()}
    return files, packed, folder / "installed"


def test_sdist_holds_the_whole_repository(built):
    files, packed, _ = built
    assert files <= packed, f"not in the sdist: {', '.join(sorted(files - packed)[:10])} (MANIFEST.in)"


def test_wheel_holds_the_library_and_says_that_it_is_typed(built):
    files, _, installed = built
    library = {f for f in files if f.startswith("attnbook/")}
    assert (
        "attnbook/py.typed"
        in library
        == {p.relative_to(installed).as_posix() for p in (installed / "attnbook").rglob("*") if p.is_file()}
    )


def test_modules_import_with_torch_triton_and_numpy_only(built, tmp_path):
    """Every module of an installed wheel, where only the library's own requirements are there; and none brings what makes an import slow: torch's compiler takes
    two seconds. One process imports them all, chapters first."""
    chapters = [c.module.removeprefix("attnbook.") for c in READY if c.paper]
    env = hidden_env(tmp_path / "site", library=built[2])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.replace("CHAPTERS", repr(chapters))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    where, count, failed, heavy = json.loads(done.stdout)
    assert Path(where).is_relative_to(built[2]) and count > len(READY)
    assert not failed, "\n".join(f"{n}: {e}" for n, e in failed.items())
    assert not heavy, f"loaded with the first module that is named: {heavy}"


def code_of(notebook):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


OPTIONAL = {"timm", "nbdev"}


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda p: p.stem)
def test_notebooks_import_what_the_extra_book_brings(notebook):
    """Imports that may fail stand in a `try`, or in a function that is called where the package is: timm, a peer; nbdev in the exporter, which belongs to the extra dev."""
    pytest.importorskip("papermill")  # what a package is called is known where it is installed
    known = sys.stdlib_module_names | modules_of(packages_of("book", data=True))
    unknown = set()

    def look(node, inside=False):
        if isinstance(node, ast.Try):
            return
        inside |= isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")
        if isinstance(node, ast.Import):
            unknown.update({a.name.split(".")[0] for a in node.names} - (OPTIONAL if inside else set()))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            unknown.update({node.module.split(".")[0]} - (OPTIONAL if inside else set()))
        for child in ast.iter_child_nodes(node):
            look(child, inside)

    for cell in code_of(notebook):
        look(ast.parse(re.sub(r"^[%!].*$", "", "".join(cell["source"]), flags=re.M)))
    assert unknown <= known, f"{notebook.name} imports {', '.join(sorted(unknown - known))}"


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda p: p.stem)
def test_cells_have_ids_of_their_own(notebook):
    """JupyterLab gives a cell whose id stands twice another one, and the modules name cells by their ids."""
    ids = [cell["id"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    assert len(ids) == len(set(ids)), sorted(i for i in set(ids) if ids.count(i) > 1)


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda p: p.stem)
def test_figures_have_captions(notebook):
    """A figure has a description for those who do not see it, and a caption, which is shorter."""
    wrong = []
    for cell in json.loads(notebook.read_text())["cells"]:
        options = dict(re.findall(r"^#\| (fig-(?:alt|cap)): (.+)$", "".join(cell["source"]), re.M))
        if len(options) == 1 or (options and options["fig-alt"] == options["fig-cap"]):
            wrong.append((cell["id"], options))
    assert not wrong, wrong


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda p: p.stem)
def test_option_lines_are_yaml(notebook):
    """Quarto reads the lines `#| name: value` of a cell as YAML, and one that is none stops the whole site."""
    for cell in code_of(notebook):
        lines = []
        for line in cell["source"]:
            if not (m := re.match(r"#\s*\|\s?(.*)", line)):
                break
            lines += [m[1]] if re.match(r"[\w-]+:( |$)", m[1]) else []
        for text in [*lines, "\n".join(lines)]:
            try:
                assert isinstance(yaml.safe_load(text), dict) or not text
            except (yaml.YAMLError, AssertionError) as e:
                raise AssertionError(
                    f"cell {cell['id']}: `#| {text[:90]}` is no YAML; quote a text with a colon ({str(e).splitlines()[0]})"
                ) from None


@pytest.mark.parametrize("rows", ["none", "cpu"])
@pytest.mark.parametrize("chapter", [c for c in READY if c.paper], ids=lambda c: c.name)
def test_claims_are_judged_whatever_rows_there_are(chapter, rows, tmp_path):
    """A run on a laptop is judged by its own rows, which are few."""
    if rows == "cpu":
        recorded = ROOT / "nbs" / "results" / f"{chapter.name}.jsonl"
        lines = recorded.read_text().splitlines() if recorded.is_file() else []  # a new chapter has none
        kept = [line for line in lines if json.loads(line)["preset"] == "cpu"]
        (tmp_path / f"{chapter.name}.jsonl").write_text("".join(f"{line}\n" for line in kept))
    with rows_from(tmp_path):
        judged = [c.judge().verdict for c in chapter_claims(chapter.name)]
    assert judged and set(judged) <= set(VERDICTS)


@pytest.mark.parametrize("chapter", [c for c in READY if c.paper], ids=lambda c: c.name)
def test_presets_are_the_known_ones(chapter):
    studies = (ROOT / "attnbook" / chapter.name).glob("*study.py")
    found = [
        importlib.import_module(f"attnbook.{chapter.name}.{p.stem}").PRESETS
        for p in studies
        if re.search(r"^PRESETS = ", p.read_text(), re.M)
    ]
    assert [tuple(presets) for presets in found] == [PRESET_NAMES]
    assert "laptop" not in read_parameters(chapter.path)["preset"].help


def test_what_is_said_about_versions_agrees():
    first, last = doctor.TESTED["Python"]
    assert PROJECT["requires-python"] == f">={first}"
    listed = [
        c.rpartition(" ")[2]
        for c in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)
    ]
    assert (listed[0], listed[-1]) == (first, last)
    assert (
        f"Python {first} to {last}" in (ROOT / "README.md").read_text()
        and f"Python {first} to {last}" in (ROOT / "Makefile").read_text()
    )
    for name in ("torch", "triton"):
        first, last = doctor.TESTED[name]
        assert (
            any(d.startswith(f"{name}>={first}") for d in PROJECT["dependencies"])
            and f"{name} {first} to {last}" in (ROOT / "README.md").read_text()
        )
        pinned = re.search(rf"^{name}==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
        assert doctor._version(first) <= doctor._version(pinned) <= doctor._version(last)
