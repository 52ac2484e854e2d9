# Written from the test cells of nbs/1_foundations/18_reading.ipynb by `attnbook export`. Do not edit.
# fmt: off
import pytest

from attnbook.lab.book import CHAPTERS
from attnbook.lab.references import _PAPERS, bibliography, bibtex


def test_every_paper_can_be_cited():
    assert {c.name for c in CHAPTERS.values() if c.paper} == set(_PAPERS)
    for name, (_, authors, _, _, year, arxiv) in _PAPERS.items():
        assert (
            f"arXiv {arxiv}" in CHAPTERS[name].paper
            and year in CHAPTERS[name].paper
            and authors.split(",")[0] in CHAPTERS[name].paper
        )
    assert (
        len({key for key, *_ in _PAPERS.values()}) == 22
        and bibtex().count("@") == 22
        and bibliography().count("\n") == 21
    )


def test_an_entry():
    assert bibtex("davit").splitlines()[:3] == [
        "@inproceedings{ding2022davit,",
        "  author = {Ding, Mingyu and Xiao, Bin and Codella, Noel and Luo, Ping and Wang, Jingdong and Yuan, Lu},",
        "  title = {{DaViT: Dual Attention Vision Transformers}},",
    ]
    assert (
        bibtex("van").startswith("@misc{guo2022van")
        and "howpublished = {arXiv:2202.09741}" in bibtex("van")
        and bibtex("routing").startswith("@article")
    )
    with pytest.raises(ValueError, match="'engine' is a foundation"):
        bibtex("engine")
