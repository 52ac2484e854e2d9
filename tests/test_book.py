# Written from the test cells of nbs/1_foundations/05_book.ipynb by `attnbook export`. Do not edit.
# fmt: off
import ast
import inspect
import json
import math
import re
import sys
import tempfile
from dataclasses import replace
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
    list_chapters,
    markdown_table,
    require,
)
from attnbook.lab.claims import Claim, Verdict, at_least
from attnbook.lab.experiments import choose_experiments, experiment_parameters, find_experiments, run_experiments
from attnbook.lab.pages import fold_line, notebook_body, relocated, to_html
from attnbook.lab.parameters import (
    Parameter,
    _declared,
    _kinds,
    as_code,
    check_parameters,
    example_notebook,
    read_parameters,
)
from attnbook.lab.run import (
    Run,
    RunFailed,
    _judged,
    _tally,
    run_chapter,
    run_report,
    run_summary,
    where_measured,
    with_parameters,
)
from attnbook.lab.sweep import _keep_run, _run_name, _start_ray, _sweep_gpus, sweep_parameters, sweep_table


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
    assert (
        [c.name for c in list_chapters()] == list(CHAPTERS)
        and find_chapter("halo") in list_chapters(ready=True)
        and {c.status for c in list_chapters(ready=True)} == {"ready"}
    )
    assert find_chapter("site").notebook == "nbs/1_foundations/15_site.ipynb"


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
    assert (
        _kinds("Literal['a', 1] | None")
        == ((str, int, type(None)), ("a", 1, None))
        == _kinds("Optional[Literal['a', 1]]")
    )
    assert _kinds("torch.dtype") == ((), ()) and _kinds("tuple[int, ...]") == ((tuple,), ())


def test_parameters_are_read_from_text():
    of = lambda kinds, text: check_parameters({"x": text}, {"x": Parameter("x", kinds, None)}, text=True)["x"]
    assert [of((int,), "3"), of((float,), "1e-3"), of((bool,), "False"), of((str,), "3"), of((list,), "[1, 2]")] == [
        3,
        1e-3,
        False,
        "3",
        [1, 2],
    ]
    assert (
        of((int, type(None)), "none") is None
        and of((int, str), "7") == 7
        and of((), "7") == 7
        and of((), "a b") == "a b"
    )
    for kinds, text in (((int,), "3.5"), ((int,), "abc"), ((bool,), "1"), ((list,), "3"), ((float,), "x")):
        with pytest.raises(TypeError, match="parameter x"):
            of(kinds, text)


def test_values_as_code():
    for value in (None, True, -3, 1e-5, "a'\n\"b", (1,), (), [1, (2, [3.5])], {1: "x", "y": (None, {})}):
        assert ast.literal_eval(as_code(value)) == value
    assert math.isinf(eval(as_code([-math.inf]))[0]) and math.isnan(eval(as_code(math.nan)))
    for value in ({1, 2}, b"x", 1j, Path("x"), type("Int", (int,), {})(3)):
        with pytest.raises(TypeError, match="which no literal"):
            as_code([value])


def test_numbers_have_bounds():
    p = lambda help, kinds=(int,): {
        "x": Parameter("x", kinds, 0, help, bounds=_declared("x", None, ast.Constant(0), help).bounds)
    }
    assert (
        check_parameters({"x": 1}, p("layers, >= 1")) == {"x": 1}
        and str(p("> 0 and <= 0.5")["x"]) == "x (int, > 0, <= 0.5)"
    )
    assert (
        check_parameters({"x": (1, 2)}, p(">= 1", (tuple,))) == {"x": (1, 2)} and p("a -> b; 3 < 5x")["x"].bounds == ()
    )
    for help, kinds, value in (
        (">= 1", (int,), 0),
        ("> 0", (float,), 0.0),
        ("< 1", (float,), 1),
        (">= 0", (tuple,), (1, -1)),
        ("> 0", (float,), math.nan),
    ):
        with pytest.raises(ValueError, match=r"parameter x \(.*cannot be"):
            check_parameters({"x": value}, p(help, kinds))


def test_bad_parameters_are_refused():
    declared = {
        "steps": Parameter("steps", (int,), 3),
        "preset": Parameter("preset", (str,), "cpu", choices=("cpu", "gpu")),
        "rate": Parameter("rate", (float,), 0.1),
    }
    with pytest.raises(
        ValueError,
        match=r"no parameter 'step' \(did you mean 'steps'\?\); it has steps \(int\), preset \('cpu' \| 'gpu'\)",
    ):
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
    assert [str(p) for p in declared.values()] == ["preset ('smoke' | 'cpu' | 'gpu')", "n (int, >= 0)", "scale (float)"]
    assert (declared["n"].default, declared["n"].help) == (5, "terms, >= 0")


def test_whatever_is_assigned_is_a_parameter():
    cell = new_code_cell(
        """%matplotlib inline
from typing import Literal
a: int | None = None  # nothing yet
b: Literal["x", "y"] = "x"
c: tuple = (1,  # one
            2)  # two, >= 0
d = {"k": -1}; steps: int = 0  # 0 takes the preset's
e: float = 2 * 3.0
f, g = 1, 2
h: int""",
        metadata={"tags": ["parameters"]},
    )
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(new_notebook(cells=[new_code_cell("z = 1"), cell]), path := Path(folder) / "a.ipynb")
        declared = read_parameters(path)
        nbformat.write(new_notebook(cells=[new_code_cell("a: int = ", metadata={"tags": ["parameters"]})]), path)
        with pytest.raises(ValueError, match="parameters of a.ipynb cannot be read"):
            read_parameters(path)
    assert [str(p) for p in declared.values()] == [
        "a (int | None)",
        "b ('x' | 'y')",
        "c (tuple, >= 0)",
        "d (dict)",
        "steps (int, >= 0)",
        "e (float)",
    ]
    assert [p.default for p in declared.values()] == [None, "x", (1, 2), {"k": -1}, 0, "2 * 3.0"] and declared[
        "c"
    ].help == "two, >= 0"


def test_experiments_are_chosen():
    names = ("a", "b", "c")
    assert choose_experiments(None, names) == names and choose_experiments("b", names) == ("b",)
    assert choose_experiments(["c", "a", "c"], names) == ("c", "a") and choose_experiments((), names) == ()
    with pytest.raises(ValueError, match="only must be one of 'a', 'b', 'c', not 'd'"):
        choose_experiments(("a", "d"), names)


def test_experiments_run_without_a_notebook(monkeypatch):
    seen = []

    def run(preset, device=None, seed=0, only=None, runs=None, limit_s=9.0, fresh=False, pick=None, show=print):
        choose_experiments(only, ("nets", "cost"))
        seen.append((preset, device, seed, only, runs, limit_s, fresh, show))
        return [dict(row=1)]

    run.__annotations__ = dict(preset="str", device="str | None", seed="int", only="str | Sequence[str] | None")
    run.__annotations__ |= dict(runs="Sequence[int] | None", limit_s="float", fresh=bool, pick="Callable | None")
    here = run_experiments.__globals__
    monkeypatch.setitem(here, "find_experiments", lambda chapter: run if chapter == "halo" else None)
    monkeypatch.setattr(here["require"]("torch").cuda, "is_available", lambda: False)
    assert run_experiments("halo", show=str) == [dict(row=1)]
    assert seen.pop() == ("cpu", "cpu", 0, None, None, 9.0, False, str)
    text = dict(seed="3", runs="4,5", limit_s="2", fresh="true")
    run_experiments("halo", text, only=["nets"], preset="smoke", show=str)
    assert seen.pop() == ("smoke", "cpu", 3, ("nets",), [4, 5], 2.0, True, str)
    run_experiments("halo", dict(runs=[7], limit_s=1), show=str)
    assert seen.pop()[4:6] == ([7], 1)
    for how, words in (
        (dict(parameters=dict(sed="3")), "no parameter 'sed' .did you mean 'seed'"),
        (dict(parameters=dict(pick="3")), "no parameter 'pick'"),
        (dict(parameters=dict(preset="cpu")), "no parameter 'preset'"),
        (dict(only=["art"]), "only must be one of 'nets', 'cost', not 'art'"),
        (dict(preset="laptop"), "preset must be one of"),
        (dict(device="tpu"), "device must be one of"),
        (dict(device="cuda"), "torch sees no GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            run_experiments("halo", **how)
    for wrong in (dict(seed="x"), dict(seed=1.5), dict(limit_s="soon"), dict(runs=3)):
        with pytest.raises(TypeError, match="cannot be"):
            run_experiments("halo", wrong)
    with pytest.raises(ValueError, match="convit has no experiments"):
        run_experiments("convit")
    assert not seen


@pytest.mark.parametrize("chapter", [c.name for c in list_chapters(ready=True) if c.paper])
def test_every_chapter_runs_its_experiments(chapter):
    "Preset, device and seed come first, and what is said goes where one wants."
    run = find_experiments(chapter)
    assert list(inspect.signature(run).parameters)[:3] == ["preset", "device", "seed"], run
    assert "show" in inspect.signature(run).parameters and run.__doc__
    assert {"preset", "device", "seed"} <= set(experiment_parameters(run))


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def test_page_is_self_contained():
    nb = new_notebook(
        cells=[
            new_markdown_cell(
                "# Title\n\n> A promise.\n\nInline $a_i$, $0<M$ and\n\n$$\n\\sum_i a_i\n$$ {#eq-sum}\n\nSee @eq-sum. Cost: \\$5.\n\n| a | b |\n|---|---|\n| $x$ | 2 |"
            ),
            new_code_cell(
                "#| echo: false\n#| label: fig-dot\n#| fig-cap: One dot.\n#| fig-alt: a dot\nplot()",
                outputs=[new_output("display_data", {"image/png": PNG})],
            ),
            new_code_cell("#| hide\nsecret = 1"),
            new_code_cell(
                "#| exports\nvisible = 1",
                outputs=[new_output("display_data", {"text/markdown": "| $y$ |\n|---|\n| 1 |"})],
            ),
            new_markdown_cell(
                "# Another title\n\nIn @fig-dot; not [here](http://a.b/c).\n\n## A *step*: 1\n\n## A step 1"
            ),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(nb, f"{folder}/a.ipynb")
        page = to_html(f"{folder}/a.ipynb", f"{folder}/a.html").read_text()
    assert page.count("<math") == 5 and "Eq. (1)" in page and "$$" not in page and "Cost: $5" in page
    assert (
        not re.findall(r"""(?:src|<link[^>]*href)=["']?(?:https?:)?//""", page)
        and "<script" not in page
        and "@import" not in page
        and "url(" not in page
    )
    assert (
        "data:image/png;base64" in page
        and 'alt="a dot"' in page
        and "Figure 1. One dot." in page
        and '<a href="#figure-1">Figure 1</a>' in page
    )
    assert (
        "visible" in page
        and "secret" not in page
        and "plot()" not in page
        and "#|" not in page
        and "<title>Title" in page
    )
    assert page.count("<h1") == 1 and 'content="A promise."' in page
    assert (
        re.findall(r'<h2 id="([^"]+)"', page)
        == ["another-title", "a-step-1", "a-step-1-1"]
        == re.findall(r'<li><a href="#([^"]+)"', page)
    )
    assert (
        page.count('<div class="table" tabindex="0"><table>') == 2
        and page.count('<div class="math"><math') == 1
        and '<span class="math"' not in page
    )


@pytest.mark.parametrize(
    "source, steer, says",
    [
        ("def test_it_works():\n    pass\n\ntest_it_works()", {"test": ""}, "Test: it works"),
        ("COMPILE = []", {"compile": ""}, "Kernels to compile without a GPU"),
        ("import a\nfrom b import (\n    c,\n)", {}, "Imports"),
        ("class A:\n    x = 1\n" + "    y = 1\n" * 28, {}, ""),
        ("class A:\n    x = 1\n" + "    y = 1\n" * 29, {}, "Code, 31 lines: A"),
        ("x = 1", {"exports": ""}, ""),
    ],
    ids=["test", "compile", "imports", "30 lines", "31 lines", "short"],
)
def test_cells_that_are_folded(source, steer, says):
    assert fold_line(source, steer) == says
    marks = "".join(f"#| {name}\n" for name in steer)
    page = "".join(notebook_body(new_notebook(cells=[new_code_cell(marks + source)])).parts)
    assert ("<details" in page) == bool(says) and "open" not in page


def test_claims_tell_their_columns():
    table = str(markdown_table(["claim", "verdict"], [["a", "holds"], ["b", "does not hold here"]]))
    page = "".join(notebook_body(new_notebook(cells=[new_markdown_cell(table)])).parts)
    assert 'class="claims"' in page and page.count('data-label="claim"') == page.count('data-label="verdict"') == 2
    assert '<td data-label="verdict" class="holds">holds</td>' in page and 'class="not">does not hold here' in page
    assert 'class="claims"' not in "".join(
        notebook_body(new_notebook(cells=[new_markdown_cell(table.replace("verdict", "x"))])).parts
    )


def test_links_are_aimed_from_the_page(tmp_path):
    for path in ("nbs/1_a/b.ipynb", "nbs/2_c/d.ipynb", "nbs/2_c/e.ipynb", "_site/2_c/d.html", "runs/b-1/b.html"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    link = relocated(tmp_path / "nbs/1_a/b.ipynb", tmp_path / "runs/b-1/b.html", tmp_path / "_site")
    assert link("../2_c/d.ipynb#x") == "../../_site/2_c/d.html#x" and link("../2_c/e.ipynb") == "../../nbs/2_c/e.ipynb"
    for url in ("https://arxiv.org/abs/1", "mailto:a@b.c", "#x", "/root"):
        assert link(url) == url


def test_report_of_a_run():
    claims = [Claim("a | b", "2x", "Table 1", at_least(2), 3.0), Claim("c", "4", "", at_least(2), 1)]
    run = Run("small", Path(), Path(), None, {"n": 7}, 61.4, verdicts={"holds": 1, "does not hold here": 1})
    text = run_report(run, [(c, c.judge()) for c in claims], [(claims[0], Verdict("not measured"))])
    assert (
        "in 61 s on " in text and "`n = 7`" in text and "Of the paper's claims: holds 1, does not hold here 1." in text
    )
    assert text.splitlines()[-2:] == [
        "| a \\| b | 2x (Table 1) | 3 | **holds** | not measured |",
        "| c | 4 | 1 | **does not hold here** | – |",
    ]
    failed = run_report(replace(run, error="cell 3: KeyError"), [], [])
    assert failed.startswith("## This run failed") and failed.endswith("\n\n    cell 3: KeyError")


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
    assert (
        summary["parameters"] == {"n": 7, "preset": "cpu"}
        and summary["claims"] == []
        and summary["error"] == ""
        and "21" in page
        and "<math" in page
    )
    assert (
        page.index("<h1") < page.index('id="what-this-run-says"') < page.index("<pre>21")
        and "#what-this-run-says" in page
    )
    assert "small finished" in run_summary(run) and "1 row in small.jsonl" in run_summary(run)


def test_failed_run_says_where_and_keeps_the_rest():
    with tempfile.TemporaryDirectory() as folder:
        source = example_notebook(
            Path(folder) / "small.ipynb", "#| export\nif n > 3:\n    raise RuntimeError('too many terms')"
        )
        with pytest.raises(
            RunFailed, match=r"`if n > 3:`, under 'A small chapter'\): RuntimeError: too many terms"
        ) as e:
            run_chapter(source, out=Path(folder) / "runs", progress=False)
        run = e.value.run
        assert (
            run.page.is_file()
            and run.notebook.is_file()
            and run.rows == {"small.jsonl": 1}
            and "failed in cell" in run_summary(run)
        )


def test_values_arrive_as_they_were_given():
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            new_code_cell("t: tuple = (1, 2)\nd: dict = {}\nx: float | None = 1.0", metadata={"tags": ["parameters"]}),
            new_code_cell("print((t, d, x))"),
        ]
        nbformat.write(new_notebook(cells=cells), source := Path(folder) / "values.ipynb")
        given = check_parameters(
            {"t": "(3, 'a')", "d": "{1: (None, 'x')}", "x": "inf"}, read_parameters(source), text=True
        )
        injected = with_parameters(source, given).cells[1].source
        assert [c.source for c in with_parameters(source, {}).cells] == [c.source for c in cells]
    scope = {}
    exec(injected, scope)
    assert (scope["t"], scope["d"], scope["x"]) == ((3, "a"), {1: (None, "x")}, math.inf)


def test_claims_are_judged_by_rows_of_one_folder(monkeypatch):
    from attnbook.lab.claims import Claim, at_least
    from attnbook.lab.results import load_results, record

    best = lambda: max((r["score"] for r in load_results("halo")), default=None)
    monkeypatch.setattr(
        sys.modules[_judged.__module__],
        "chapter_claims",
        lambda name: [
            Claim("high", "9", "Table 1", at_least(5), best),
            Claim("there", "", "", lambda m: "holds", 1),
            Claim("broken", "", "", at_least(1), lambda: 1 / 0),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, score in (("own", 3.0), ("book", 7.0)):
            monkeypatch.setenv("ATTNBOOK_RESULTS", f"{folder}/{name}")
            record("halo", "a", device=f"GPU {name}", score=score)
        verdicts = {
            name: _tally(v.verdict for _, v in _judged("halo", Path(folder) / name)) for name in ("own", "book", "none")
        }
        with sys.modules[record.__module__].rows_from(Path(folder) / "own"):
            assert where_measured(load_results("halo")) == "GPU own, preset gpu"
    assert verdicts == {
        "own": {"holds": 1, "does not hold here": 1, "not measured": 1},
        "book": {"holds": 2, "not measured": 1},
        "none": {"holds": 1, "not measured": 2},
    }
    assert _judged("small", Path()) == [] == _judged("halo", None) and where_measured([]) == "nothing"


def test_bad_runs_do_not_start():
    with tempfile.TemporaryDirectory() as folder:
        source = example_notebook(Path(folder) / "small.ipynb")
        start = lambda chapter=source, parameters=None, **kw: run_chapter(
            chapter, parameters, **{"out": Path(folder) / "runs", "progress": False} | kw
        )
        for kw, error, words in (
            (dict(chapter="zzz"), ValueError, "unknown chapter 'zzz'"),
            (dict(chapter=Path(folder) / "none.ipynb"), ValueError, "no notebook"),
            (dict(parameters={"m": 3}), ValueError, "no parameter 'm'"),
            (dict(parameters={"n": "many"}), TypeError, "n \\(int, >= 0\\).*'many'"),
            (dict(preset="tpu"), ValueError, "'smoke' | 'cpu' | 'gpu'"),
            (dict(record=True), ValueError, "rows of small cannot be recorded: it is no chapter"),
            (dict(out=source / "below"), OSError, "cannot write to the output folder"),
        ):
            with pytest.raises(error, match=words):
                start(**kw)
        assert not (Path(folder) / "runs").exists()


def test_every_combination():
    declared = {"n": Parameter("n", (int,), 5), "scale": Parameter("scale", (float, type(None)), None)}
    assert sweep_parameters({"n": ["1", "2"], "scale": ["none", "1"]}, declared, text=True) == [
        dict(n=n, scale=s) for n in (1, 2) for s in (None, 1.0)
    ]
    for grid, error, words in (
        ({}, ValueError, r"this notebook has n \(int\), scale \(float \| None\)"),
        ({"n": []}, ValueError, "'n' is given no value"),
        ({"n": [1, 1]}, ValueError, "'n' is given a value twice"),
        ({"m": [1]}, ValueError, "no parameter 'm'"),
        ({"n": [1, 2.5]}, TypeError, "n \\(int\\).*2.5"),
    ):
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
        return [{"Alive": True, "Resources": {"CPU": 8.0, **({"GPU": float(n)} if n else {})}} for n in self.gpus] + [
            {"Alive": False, "Resources": {"GPU": 16.0}}
        ]


def test_ray_that_gives_up_on_itself_is_started_again():
    class Slow:
        def __init__(self, slow):
            self.slow, self.calls = slow, []

        def shutdown(self):
            self.calls.append("shutdown")

        def init(self, **options):
            self.calls.append(options["address"])
            if len(self.calls) <= 2 * self.slow:
                raise Exception("The current node timed out during startup. This could happen")
            return "up"

    ray = Slow(2)
    assert _start_ray(ray, address="local") == "up" and ray.calls == ["local", "shutdown", "local", "shutdown", "local"]
    with pytest.raises(ConnectionError, match="3 tries timed out"):
        _start_ray(Slow(3), address="local")
    with pytest.raises(KeyError):
        _start_ray(Slow(0), tries=2)


def test_gpus_of_a_run():
    assert (
        _sweep_gpus(_Nodes(0, 0), None) == 0
        and _sweep_gpus(_Nodes(0, 4), None) == 1
        and _sweep_gpus(_Nodes(0, 4), 0.5) == 0.5
        and _sweep_gpus(_Nodes(4), 0) == 0
    )
    for nodes, gpus in ((_Nodes(0), 1), (_Nodes(2, 4), 8), (_Nodes(4), -1)):
        with pytest.raises(
            ValueError, match=f"cannot have {gpus} GPUs: the machine with the most has {max(nodes.gpus)}"
        ):
            _sweep_gpus(nodes, gpus)


def test_table_of_a_sweep():
    with tempfile.TemporaryDirectory() as folder:

        def run(n, *rows, **kw):
            (path := Path(folder) / f"n={n}" / "results").mkdir(parents=True)
            (path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            return Run("small", path.parent, Path(), None, {"n": n}, 2.4, rows={"a.jsonl": len(rows)}, **kw)

        row = lambda n, m, s, **kw: (
            {"name": "net", "key": ["n", "method"], "n": n, "method": m, "score": s, "ms": 2.0, "seed": 0} | kw
        )
        runs = [
            run(1, row(1, "ours", 0.25), row(1, "torch", 0.123456), verdicts={"holds": 1}),
            run(2, error="cell 3 (`a | b`): KeyError"),
            run(3, row(3, "ours", 9.0), row(3, "ours", 0.5), row(3, "torch", 0.125, extra=1.0)),
        ]
        table, short = sweep_table(runs), sweep_table(runs, most=1)
    assert (
        table.splitlines()[0]
        == "| run | n | net ours score | net torch score | net ours ms | net torch ms | seconds | rows | claims | folder | outcome |"
    )
    assert table.splitlines()[2:] == [
        "| 1 | 1 | 0.25 | 0.1235 | 2 | 2 | 2 | 2 | holds: 1 | n=1 | finished |",
        "| 2 | 2 |  |  |  |  | 2 | 0 |  | n=2 | failed: cell 3 (`a \\| b`): KeyError |",
        "| 3 | 3 | 0.5 | 0.125 | 2 | 2 | 2 | 3 |  | n=3 | finished |",
    ]
    assert "| net ours score | seconds |" in short and short.endswith("3 more numbers of each run are in its results")
