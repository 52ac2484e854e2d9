"""What `make book` gives to Quarto: settings, and the notebooks as nbdev prepares them. Needs no Quarto."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attnbook.lab.export import notebooks
from attnbook.lab.quarto import api_anchor
from attnbook.lab.rooms import read_sections

ROOT = Path(__file__).resolve().parent.parent
PROCESS = """
import json, pathlib, sys
import nbdev.serve_drv
from nbdev.processors import FilterDefaults
failed = {}
for path in map(pathlib.Path, sys.argv[1:]):
    made = "_proc" / path.relative_to("nbs")
    made.parent.mkdir(parents=True, exist_ok=True)
    try:
        nbdev.serve_drv.main((path.resolve(), made, FilterDefaults))
    except Exception as e:
        failed[path.name] = f"{type(e).__name__}: {e}" + (f" ({e.__cause__!r})" if e.__cause__ else "")
print(json.dumps(failed))
"""


def is_special(notebook) -> bool:
    """Whether nbdev may stumble: it runs the whole of a cell with an import in it, and such a cell may do more than import."""
    for c in json.loads(notebook.read_text())["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "code" and not re.search(r"^#\| *(exports?|exporti|default_exp)\b", source, re.M):
            kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body}
            if len(kinds) == 2:
                return True
    return False


@pytest.fixture(scope="module")
def processed(tmp_path_factory, request):
    """The notebooks as nbdev prepares them, by path: with --slow all, else those that may break and two more."""
    pytest.importorskip("nbdev")
    few = ("index", "05_book", "halo")
    chosen = [n for n in notebooks(ROOT) if request.config.getoption("--slow") or n.stem in few or is_special(n)]
    folder = tmp_path_factory.mktemp("quarto")
    copy = folder / "attnbook"
    for name in ("attnbook", "nbs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in ("settings.ini", "_quarto.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    (folder / "process.py").write_text(PROCESS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(folder / "process.py"), *(str(n.relative_to(ROOT)) for n in chosen)],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}: {e}" for name, e in failed.items())
    return {
        p.relative_to(copy / "_proc").as_posix(): json.loads(p.read_text()) for p in (copy / "_proc").rglob("*.ipynb")
    }


def texts(page):
    """What stands on a page as Markdown: prose, and outputs."""
    for c in page["cells"]:
        if c["cell_type"] == "markdown":
            yield "".join(c["source"])
        yield from ("".join(o.get("data", {}).get("text/markdown", "")) for o in c.get("outputs", []))


def test_notebooks_are_processed(processed):
    """nbdev runs imports and exported cells in a fresh shell and documents what they define."""
    assert {"index.ipynb", "1_foundations/05_book.ipynb", "3_locality/halo.ipynb"} <= set(processed)
    assert any("run_chapter" in t for t in texts(processed["1_foundations/05_book.ipynb"]))


def test_kernels_are_described_with_their_arguments(processed):
    shown = [t for page in processed.values() for t in texts(page)]
    assert not [t[:200] for t in shown if "Call self as a function" in t]
    assert any("halo_seen" in t and "constexpr" in t for t in shown) or any("{#api-halo_seen" in t for t in shown)


def test_folds_are_closed(processed):
    folds = [
        m
        for page in processed.values()
        for c in page["cells"]
        for m in re.findall(r"^#\| code-fold: (\w+)", "".join(c["source"]), re.M)
    ]
    assert len(folds) > 5 * len(processed) and set(folds) == {"true"}


def test_links_name_descriptions_that_are_there(processed):
    anchors, wrong = {}, []
    for path, page in processed.items():
        name = re.sub(r"(^|/)\d+_(?=[^/]*$)", r"\1", path).removesuffix(".ipynb") + ".html"
        anchors[name] = {m for t in texts(page) for m in re.findall(r"^#+ .*\{#(api-[\w.-]+)", t, re.M)}
    for path, page in processed.items():
        for t in texts(page):
            wrong += [
                (path, to, a)
                for to, a in re.findall(r"\(https://attnbook\.github\.io/attnbook/([\w/]+\.html)#([\w.-]+)\)", t)
                if to in anchors and a not in anchors[to]
            ]
    assert sum(map(len, anchors.values())) > 8 * len(processed)
    rooms = [r for n in notebooks(ROOT) for r in read_sections(n).rooms.values()]
    hidden = {
        api_anchor(name)
        for r in rooms
        for _, source, public in r.cells
        if not public
        for name in re.findall(r"^(?:def |class |@.*\n)?(\w+)", source, re.M)
    }
    assert not (lost := sorted({w for w in wrong if w[2] not in hidden})), lost[
        :20
    ]  # what is exported without being shown is described nowhere


def test_settings_of_the_site():
    text = (ROOT / "_quarto.yml").read_text()
    book = yaml.safe_load(text)["book"]
    assert (
        book["repo-subdir"] == "nbs"
        and book["site-url"].startswith("https://")
        and book["open-graph"] is True
        and "website" not in yaml.safe_load(text)
    )
    html = yaml.safe_load(text)["format"]["html"]
    assert set(html["theme"].values()) <= {"default", "slate", "cerulean", "litera", "pulse"}, (
        "the other themes load fonts from Google"
    )
    assert html["number-depth"] <= 2 and html["html-math-method"] == "mathml"
    index = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"][0]
    assert index["cell_type"] == "raw" and "number-sections: false" in "".join(index["source"])


@pytest.mark.parametrize("notebook", notebooks(ROOT), ids=lambda p: p.stem)
def test_formulas_are_read_by_pandoc(notebook):
    assert not re.findall(r"\\\\Big+[lr]\b", notebook.read_text()), "pandoc does not know \\Bigl: \\Big"
