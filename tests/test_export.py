# Written from the test cells of nbs/1_foundations/11_export.ipynb by `attnbook export`. Do not edit.
# fmt: off
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from attnbook.lab.export import _test_source, make_test_file, to_markdown
from attnbook.lab.rooms import _free_names


def test_free_names():
    assert _free_names(
        "def test_a(x=N):\n    y = torch.ones(x)\n    assert len(y) == helper(y) and [z for z in y if z != M]"
    ) == {"N", "torch", "helper", "M"}
    assert _free_names("def helper(): pass\ndef test_a(): helper(); import os; os.x") == set()
    assert _free_names(
        "K = 3\n@pytest.mark.parametrize('k', range(K))\ndef test_a(k): f = lambda q: q + k; assert f(1)"
    ) == {"pytest"}


def test_calls_are_stripped():
    cell = "def test_a(n=1):\n    assert n\n\ntest_a()\nfor n in (1, 2):\n    test_a(n)\n"
    assert _test_source(cell, "x") == "def test_a(n=1):\n    assert n"
    assert _test_source("def test_b(): pass\ntest_b(), test_b()", "x") == "def test_b(): pass"
    with pytest.raises(ValueError, match="x: a test cell may hold .* not `print"):
        _test_source("print(1)", "x")


def test_a_notebook_becomes_a_test_file():
    cells = [
        "#| default_exp small",
        "import math\nfrom json import dumps, loads\nfrom json import dump as d\nimport os.path",
        "#| export\ndef double(x): return 2 * x\ndef _half(x): return x / 2",
        "#| test\ndef test_double():\n    assert double(math.pi) == loads('6.283185307179586') and _half(2) == 1 and d\n\ntest_double()",
        "#| test\n#| cuda\ndef test_gpu():\n    assert os.path.sep",
    ]
    with tempfile.TemporaryDirectory() as folder:
        write = lambda cells: nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells]), f"{folder}/a.ipynb")
        write(cells)
        source = make_test_file(Path(folder) / "a.ipynb", "nbs/a.ipynb")
        assert "nbs/a.ipynb" in source.splitlines()[0]
        assert (
            "import math\nimport os.path\nfrom json import loads\nfrom json import dump as d\n\nimport pytest\n\nfrom attnbook.small import _half, double\n"
            in source
        )
        assert (
            "dumps" not in source
            and "_half, double\n\n\ndef test_double" in source
            and "\ntest_double()" not in source
            and "@pytest.mark.cuda\ndef test_gpu" in source
        )
        write([*cells, "#| test\ndef test_c():\n    assert helper()"])
        with pytest.raises(ValueError, match="tests use helper, which the notebook neither exports nor imports"):
            make_test_file(Path(folder) / "a.ipynb", "nbs/a.ipynb")
        write([*cells, cells[3]])
        with pytest.raises(ValueError, match="two test cells define test_double"):
            make_test_file(Path(folder) / "a.ipynb", "nbs/a.ipynb")
        write(cells[:3])
        assert make_test_file(Path(folder) / "a.ipynb", "nbs/a.ipynb") is None


def test_notebook_as_markdown():
    nb = new_notebook(
        cells=[
            new_markdown_cell("# T\n\n> one line"),
            new_code_cell("#| hide\nx"),
            new_code_cell(
                "#| echo: false\ny",
                outputs=[new_output("execute_result", {"text/markdown": "| a |\n|---|", "text/plain": "no"})],
            ),
            new_code_cell("#| export\n1 + 1", outputs=[new_output("execute_result", {"text/plain": "2"})]),
        ]
    )
    assert to_markdown(nb) == "# T\n\n> one line\n\n| a |\n|---|\n\n```python\n1 + 1\n```\n\n```\n2\n```\n"
