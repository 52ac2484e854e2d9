# Written from the test cells of nbs/1_foundations/05_book.ipynb by `attnbook export`. Do not edit.
import json
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from attnbook.lab.book import (
    CHAPTERS,
    PARTS,
    PRESET_NAMES,
    chapters_table,
    choose_preset,
    find_chapter,
    markdown_table,
    require,
)
from attnbook.lab.pages import to_html
from attnbook.lab.parameters import Parameter, _kinds, check_parameters, example_notebook, read_parameters
from attnbook.lab.run import Run, RunFailed, run_chapter, run_summary
from attnbook.lab.sweep import _keep_run, _run_name, _sweep_gpus, sweep_parameters, sweep_table


def test_require_says_what_to_install():
    assert require("json") is json
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package'.*pip install 'attnbook\[book\]'"):
        require("no_such_package")


def test_registry():
    assert len([c for c in CHAPTERS.values() if c.paper]) == 22
    assert {c.part for c in CHAPTERS.values()} == set(PARTS)
    assert find_chapter("attention").notebook == "nbs/1_foundations/00_attention.ipynb"
    assert find_chapter("halo").notebook == "nbs/3_locality/halo.ipynb"
    assert find_chapter("book").status == "ready"

def test_unknown_chapter_names_the_closest():
    with pytest.raises(ValueError, match="did you mean neighborhood"):
        find_chapter("neighbourhood")
    with pytest.raises(ValueError, match="there are attention, engine"):
        find_chapter("zzz")


def test_tables_escape_bars_and_lines():
    table = markdown_table(["a"], [["x | y\n z"]])
    assert table.splitlines() == ["| a |", "| --- |", "| x \\| y z |"] and table._repr_markdown_() == table
    assert "[The book itself](1_foundations/05_book.ipynb)" in chapters_table()
    assert "[arXiv 2403.04690](https://arxiv.org/abs/2403.04690)" in chapters_table()


def test_preset(monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False), monkeypatch.setenv("ATTNBOOK_PRESET", "gpu")
    assert [choose_preset(p) for p in PRESET_NAMES] == ["smoke", "cpu", "gpu"]
    monkeypatch.setenv("IN_TEST", "1")
    assert choose_preset("cpu") == "gpu"
    monkeypatch.delenv("ATTNBOOK_PRESET")
    assert choose_preset("cpu") == "smoke"
    monkeypatch.delenv("IN_TEST")
    with pytest.raises(ValueError, match="preset must be one of 'smoke', 'cpu', 'gpu', not 'tpu'"):
        choose_preset("tpu")


def test_annotations():
    assert _kinds("int") == ((int,), ()) and _kinds("list[int]") == ((list,), ())
    assert _kinds("int | None") == ((int, type(None)), ()) == _kinds("Optional[int]")
    assert _kinds("Literal['a', 'b']") == ((str,), ("a", "b"))
    assert _kinds("torch.dtype") == ((), ())

def test_parameters_are_read_from_text():
    of = lambda kinds, text: check_parameters({"x": text}, {"x": Parameter("x", kinds, None)}, text=True)["x"]
    assert [of((int,), "3"), of((float,), "1e-3"), of((bool,), "False"), of((str,), "3"), of((list,), "[1, 2]")] == [3, 1e-3, False, "3", [1, 2]]
    assert of((int, type(None)), "none") is None and of((int, str), "7") == 7 and of((), "7") == 7 and of((), "a b") == "a b"
    for kinds, text in (((int,), "3.5"), ((int,), "abc"), ((bool,), "1"), ((list,), "3"), ((float,), "x")):
        with pytest.raises(TypeError, match="parameter x"):
            of(kinds, text)

def test_bad_parameters_are_refused():
    declared = {"steps": Parameter("steps", (int,), 3), "preset": Parameter("preset", (str,), "cpu", choices=("cpu", "gpu")), "rate": Parameter("rate", (float,), 0.1)}
    with pytest.raises(ValueError, match=r"no parameter 'step' \(did you mean 'steps'\?\); it has steps \(int\), preset \('cpu' \| 'gpu'\)"):
        check_parameters({"step": 3}, declared)
    with pytest.raises(ValueError, match="'tpu'"):
        check_parameters({"preset": "tpu"}, declared)
    for bad in ("3", 3.0, True, None):
        with pytest.raises(TypeError, match=r"steps \(int\)"):
            check_parameters({"steps": bad}, declared)
    assert check_parameters({"rate": 1, "steps": 2}, declared) == {"rate": 1, "steps": 2}
    with pytest.raises(ValueError, match="no cell tagged"):
        check_parameters({"a": 1}, {})


def test_parameters_of_a_notebook():
    with tempfile.TemporaryDirectory() as folder:
        declared = read_parameters(example_notebook(Path(folder) / "small.ipynb"))
    assert [str(p) for p in declared.values()] == ["preset ('smoke' | 'cpu' | 'gpu')", "n (int)", "scale (float)"]
    assert (declared["n"].default, declared["n"].help) == (5, "terms")


def test_page_is_self_contained():
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    nb = new_notebook(cells=[
        new_markdown_cell("# Title\n\nInline $a_i$ and\n\n$$\n\\sum_i a_i\n$$ {#eq-sum}\n\nSee @eq-sum. Cost: \\$5.\n\n| a | b |\n|---|---|\n| $x$ | 2 |"),
        new_code_cell("#| echo: false\n#| fig-alt: a dot\nplot()", outputs=[new_output("display_data", {"image/png": png})]),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| exports\nvisible = 1", outputs=[new_output("display_data", {"text/markdown": "| $y$ |\n|---|\n| 1 |"})]),
    ])
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(nb, f"{folder}/a.ipynb")
        page = to_html(f"{folder}/a.ipynb", f"{folder}/a.html").read_text()
    assert page.count("<math") == 4 and "Eq. (1)" in page and "$$" not in page and "Cost: $5" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page) and "<script" not in page and "@import" not in page
    assert "data:image/png;base64" in page and 'alt="a dot"' in page
    assert "visible" in page and "secret" not in page and "plot()" not in page and "#|" not in page and "<title>Title" in page


def test_run_leaves_everything_in_one_folder():
    with tempfile.TemporaryDirectory() as folder:
        source = example_notebook(Path(folder) / "small.ipynb")
        run = run_chapter(source, {"n": "7"}, text=True, preset="cpu", out=Path(folder) / "runs", progress=False)
        row = json.loads((run.folder / "results" / "small.jsonl").read_text())
        summary = json.loads((run.folder / "summary.json").read_text())
        page = run.page.read_text()
        files = {p.name for p in run.folder.iterdir()}
    assert row == {"name": "sum", "n": 7, "sum": 21.0} and run.rows == {"small.jsonl": 1}
    assert files == {"small.ipynb", "small.html", "summary.json", "results"} and run.folder.name.startswith("small-2")
    assert summary["parameters"] == {"n": 7, "preset": "cpu"} and summary["error"] == "" and "21" in page and "<math" in page
    assert "small finished" in run_summary(run) and "1 row in small.jsonl" in run_summary(run)

def test_failed_run_says_where_and_keeps_the_rest():
    with tempfile.TemporaryDirectory() as folder:
        source = example_notebook(Path(folder) / "small.ipynb", "#| export\nif n > 3:\n    raise RuntimeError('too many terms')")
        with pytest.raises(RunFailed, match=r"`if n > 3:`, under 'A small chapter'\): RuntimeError: too many terms") as e:
            run_chapter(source, out=Path(folder) / "runs", progress=False)
        run = e.value.run
        assert run.page.is_file() and run.notebook.is_file() and run.rows == {"small.jsonl": 1} and "failed in cell" in run_summary(run)

def test_bad_runs_do_not_start():
    with tempfile.TemporaryDirectory() as folder:
        source = example_notebook(Path(folder) / "small.ipynb")
        start = lambda chapter=source, parameters=None, **kw: run_chapter(chapter, parameters, **{"out": Path(folder) / "runs", "progress": False} | kw)
        for kw, error, words in (
            (dict(chapter="zzz"), ValueError, "unknown chapter 'zzz'"),
            (dict(chapter=Path(folder) / "none.ipynb"), ValueError, "no notebook"),
            (dict(parameters={"m": 3}), ValueError, "no parameter 'm'"),
            (dict(parameters={"n": "many"}), TypeError, "n \\(int\\).*'many'"),
            (dict(preset="tpu"), ValueError, "'smoke' | 'cpu' | 'gpu'"),
            (dict(out=source / "below"), OSError, "cannot write to the output folder"),
        ):
            with pytest.raises(error, match=words):
                start(**kw)
        assert not (Path(folder) / "runs").exists()


def test_every_combination():
    declared = {"n": Parameter("n", (int,), 5), "scale": Parameter("scale", (float, type(None)), None)}
    assert sweep_parameters({"n": ["1", "2"], "scale": ["none", "1"]}, declared, text=True) == [dict(n=n, scale=s) for n in (1, 2) for s in (None, 1.0)]
    for grid, error, words in (({}, ValueError, r"this notebook has n \(int\), scale \(float \| None\)"), ({"n": []}, ValueError, "'n' is given no value"),
                               ({"n": [1, 1]}, ValueError, "'n' is given a value twice"), ({"m": [1]}, ValueError, "no parameter 'm'"), ({"n": [1, 2.5]}, TypeError, "n \\(int\\).*2.5")):
        with pytest.raises(error, match=words):
            sweep_parameters(grid, declared)

def test_runs_have_folders_of_their_own():
    assert _run_name({"scale": 0.5, "n": -1}) == _run_name({"n": -1, "scale": 0.5}) == "n=-1,scale=0.5"
    names = [_run_name({"path": p}) for p in ("a/b", "a b", "a_b", "x" * 200, "x" * 201)]
    assert len(set(names)) == 5 and all(re.fullmatch(r"path=[\w.,=+-]{3,120}", n) for n in names)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            _keep_run({"a": b"%d" % i, "b/c": b""}, Path(folder) / "n=1")
        kept = {p.relative_to(folder).as_posix(): p.read_text() for p in Path(folder).rglob("a")}
    assert kept == {"n=1/a": "2", "n=1.old-1/a": "0", "n=1.old-2/a": "1"}


class _Nodes:
    "Stands in for a Ray with two machines."
    def __init__(self, *gpus):
        self.gpus = gpus

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 8.0, **({"GPU": float(n)} if n else {})}} for n in self.gpus] + [{"Alive": False, "Resources": {"GPU": 16.0}}]

def test_gpus_of_a_run():
    assert _sweep_gpus(_Nodes(0, 0), None) == 0 and _sweep_gpus(_Nodes(0, 4), None) == 1 and _sweep_gpus(_Nodes(0, 4), 0.5) == 0.5 and _sweep_gpus(_Nodes(4), 0) == 0
    for nodes, gpus in ((_Nodes(0), 1), (_Nodes(2, 4), 8), (_Nodes(4), -1)):
        with pytest.raises(ValueError, match=f"cannot have {gpus} GPUs: the machine with the most has {max(nodes.gpus)}"):
            _sweep_gpus(nodes, gpus)

def test_table_of_a_sweep():
    run = lambda n, **kw: Run("small", Path(f"n={n}"), Path(), None, {"n": n}, 2.4, **kw)
    table = sweep_table([run(1, rows={"a": 2, "b": 1}, verdicts={"holds": 1}), run(2, error="cell 3 (`a | b`): KeyError")])
    assert table.splitlines()[2:] == ["| 1 | 1 | 2 | 3 | holds: 1 | n=1 | finished |", "| 2 | 2 | 2 | 0 |  | n=2 | failed: cell 3 (`a \\| b`): KeyError |"]
