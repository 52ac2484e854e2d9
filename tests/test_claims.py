# Written from the test cells of nbs/1_foundations/08_claims.ipynb by `attnbook export`. Do not edit.
import pytest

from attnbook.lab.claims import Claim, Verdict, claims_table


def test_verdicts_come_from_rules():
    rule = lambda x: "holds" if x > 1 else ("does not hold here", "too small")
    judge = lambda measured: Claim("c", "1", "Table 1", rule, measured=measured).judge()
    assert judge(2) == Verdict("holds", "", 2) and judge(lambda: 0) == Verdict("does not hold here", "too small", 0)
    assert judge(None) == Verdict("out of reach here", "not measured") == judge(lambda: None)
    with pytest.raises(ValueError, match="'maybe'.*holds in part"):
        Claim("c", "1", "t", lambda x: "maybe", measured=1).judge()

def test_claims_table():
    table = claims_table([Claim("a | b", "2x", "Fig. 1", lambda m: "holds", measured={"ours": 1.23456, "theirs": 12345.6}), Claim("c", "", "", lambda m: "holds")])
    assert "| a \\| b | 2x | Fig. 1 | ours 1.23, theirs 12346 |  | **holds** |" in table
    assert table.splitlines()[-1].endswith("| – |  | **out of reach here**: not measured |")
