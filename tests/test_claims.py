# Written from the test cells of nbs/1_foundations/08_claims.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
import statistics

import numpy as np
import pytest

from attnbook.lab.book import CHAPTERS, Chapter
from attnbook.lab.claims import (
    VERDICTS,
    WORDS,
    Claim,
    Verdict,
    all_of,
    at_least,
    at_most,
    beyond_interval,
    beyond_spread,
    chapter_claims,
    claims_table,
    exponent_between,
    interval_at_least,
    interval_at_most,
    matches,
    not_measured,
    not_worse,
    out_of_reach,
    over_range,
    within,
)
from attnbook.lab.stats import (
    Exponent,
    Interval,
    Speedup,
    binomial_tail,
    by_seed,
    cluster_bootstrap,
    clustered_counts,
    fitted_exponent,
    holm,
    interval,
    intraclass_correlation,
    newest,
    newest_recipe,
    newest_run,
    over_seeds,
    paired,
    permutation_test,
    proportion_power,
    proportion_test,
    rank_correlation,
    speedups,
    spread,
    t_quantile,
    wilson,
)


def test_verdicts_come_from_rules():
    rule = lambda x: "holds" if x > 1 else ("does not hold here", "too small")
    judge = lambda measured: Claim("c", "1", "Table 1", rule, measured=measured).judge()
    assert judge(2) == Verdict("holds", "", 2) and judge(lambda: 0) == Verdict("does not hold here", "too small", 0)
    assert judge(None) == Verdict("not measured") == judge(lambda: None)
    with pytest.raises(ValueError, match="must give one of .*holds in part.* not 'maybe'"):
        Claim("c", "1", "t", lambda x: "maybe", measured=1).judge()


def test_claims_that_nothing_judges():
    assert Claim("c", "1", "t", out_of_reach("needs ImageNet")).judge() == Verdict(
        "out of reach here", "needs ImageNet"
    )
    assert Claim("c", "1", "t", out_of_reach("needs ImageNet"), True).judge().verdict == "out of reach here"
    assert Claim("c", "1", "t", not_measured("needs a GPU")).judge() == Verdict("not measured", "needs a GPU")


def test_claims_table():
    table = claims_table(
        [
            Claim("a | b", "2x", "Fig. 1", lambda m: "holds", measured={"ours": 1.23456, "theirs": 12345.6}),
            Claim("c", "", "", lambda m: "holds"),
            Claim("d", "", "", lambda m: ("holds in part", "small"), measured=[1.5, False, None]),
        ]
    )
    assert "| a \\| b | 2x | Fig. 1 | ours 1.23, theirs 12346 |  | **holds** |" in table
    assert "| c |  |  | – |  | **not measured** |" in table
    assert table.splitlines()[-1] == "| d |  |  | 1.5, no, – |  | **holds in part**: small |"


def test_over_seeds():
    found = over_seeds([1.0, 2.0, 3.0, 6.0])
    assert (
        (found.mean, found.n) == (3.0, 4)
        and found.deviation == pytest.approx(math.sqrt(14 / 3))
        and found.error == pytest.approx(math.sqrt(14 / 3) / 2)
    )
    assert str(found) == "3, deviation 2.2, 4 seeds"
    assert str(over_seeds([1.0, 3.0])) == "2, deviation 1.4, 2 seeds"
    one = over_seeds(iter([2.0]))
    assert one.mean == 2 and math.isnan(one.deviation) and math.isnan(one.error) and str(one) == "2, one seed"
    with pytest.raises(ValueError, match="values"):
        over_seeds([])
    assert spread([1, 3, 2], [5, 5.5]) == 2 and spread([4]) == 0


@pytest.mark.parametrize(
    "df, want",
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (1000, 1.962339)],
)
def test_t_of_the_tables(df, want):
    assert t_quantile(0.95, df) == pytest.approx(want, rel=1e-6)


def test_t_against_scipy():
    t = pytest.importorskip("scipy.stats").t
    for df in (1, 2, 3, 4, 5, 8, 17, 64):
        for confidence in (0.1, 0.5, 0.9, 0.95, 0.999):
            assert t_quantile(confidence, df) == pytest.approx(t.ppf((1 + confidence) / 2, df), rel=1e-8)


@pytest.mark.parametrize("confidence, df", [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_t_that_does_not_exist(confidence, df):
    with pytest.raises(ValueError, match="confidence must be between 0 and 1 and df at least 1"):
        t_quantile(confidence, df)


RUNS = [
    dict(method=m, run=s, auc=x, size=7)
    for m, values in dict(ours=(0.8, 0.7, 0.9), base=(0.7, 0.5, 0.6, 0.1)).items()
    for s, x in enumerate(values)
]


def test_by_seed():
    assert (
        by_seed(RUNS, "auc", method="ours") == {0: 0.8, 1: 0.7, 2: 0.9} and by_seed(RUNS, "auc", method="theirs") == {}
    )
    assert by_seed([dict(seed=3, x=1), dict(seed=4, x=None)], "x", seed="seed") == {3: 1}
    with pytest.raises(ValueError, match="rows must hold one row for each run, not two for 0: auc 0.8 and 0.7"):
        by_seed(RUNS, "auc", size=7)


def test_paired_differences():
    ours, base = (by_seed(RUNS, "auc", method=m) for m in ("ours", "base"))
    found = paired(ours, base)  # differences 0.1, 0.2, 0.3: the fourth seed of the other has no partner
    assert (
        found.mean == pytest.approx(0.2)
        and found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
        and found.n == 3
    )
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    swapped = paired(base, ours)
    assert swapped.mean == pytest.approx(-0.2) and swapped.half == pytest.approx(found.half)
    assert paired(ours, base, 0.5).half < found.half and paired(ours, {}) is None
    one = paired({1: 3.0}, {1: 1.0})
    assert (
        (one.mean, one.half, one.n) == (2.0, math.inf, 1)
        and str(one) == "2, one seed"
        and str(found) == "0.2 ± 0.25, 3 seeds"
    )


def test_pairing_removes_what_the_seed_does():
    seeds = np.random.default_rng(0).normal(0, 10, 8)
    a, b = (
        {s: x + d for s, (x, d) in enumerate(zip(seeds, noise))}
        for noise in np.random.default_rng(1).normal([[1.0], [0.0]], 0.1, (2, 8))
    )
    assert paired(a, b).low > 0.5 and interval(a.values()).half > 2


def test_interval_covers():
    rng = np.random.default_rng(2)
    assert 0.93 < np.mean([abs((i := interval(x)).mean) <= i.half for x in rng.normal(0, 1, (2000, 3))]) < 0.97


@pytest.mark.parametrize(
    "successes, n, want",
    [
        (0, 10, (0.0, 0.2775328)),
        (10, 10, (0.7224672, 1.0)),
        (5, 10, (0.2365931, 0.7634069)),
        (81, 263, (0.2552888, 0.3662239)),
    ],
)
def test_wilson(successes, n, want):
    assert wilson(successes, n) == pytest.approx(want, abs=2e-4)
    low, high = wilson(successes, n)
    z = statistics.NormalDist().inv_cdf(0.975)
    for p in (
        x for x in (low, high) if 0 < x < 1
    ):  # the ends are the shares that lie z of their own standard errors away
        assert abs(successes / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))
    assert wilson(successes, n, 0.5)[1] - wilson(successes, n, 0.5)[0] < high - low


def test_wilson_refuses():
    for successes, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="successes must be from 0 to n"):
            wilson(successes, n)


def test_clusters_count_not_samples():
    low, high = cluster_bootstrap(
        [[0.0] * 100, [1.0] * 100]
    )  # two clusters: all draws are 0, 1/2 or 1, a quarter each at the ends
    assert (low, high) == (0.0, 1.0)
    low, high = cluster_bootstrap([[x] for x in [0.0, 1.0] * 100])  # two hundred: the normal interval
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / math.sqrt(200), abs=0.01) and high == pytest.approx(
        0.5 + 1.96 * 0.5 / math.sqrt(200), abs=0.01
    )


def test_bootstrap():
    clusters = [[1.0, 2.0], [3.0], [10.0, 11.0, 12.0]]
    assert (
        cluster_bootstrap(clusters, seed=1)
        == cluster_bootstrap(clusters, seed=1)
        != cluster_bootstrap(clusters, seed=2, draws=50)
    )
    assert cluster_bootstrap(clusters, np.max)[1] == 12 and cluster_bootstrap([[5.0], [5.0]]) == (5.0, 5.0)
    wide, narrow = (cluster_bootstrap(clusters, confidence=c) for c in (0.95, 0.2))
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]
    with pytest.raises(ValueError, match="clusters must be at least two, not 1"):
        cluster_bootstrap([[1.0, 2.0]])


def test_every_renaming():
    assert (
        permutation_test([3, 4, 5], [0, 1, 2]) == 2 / 20
        and permutation_test([3, 4, 5], [0, 1, 2], alternative="greater") == 1 / 20
    )
    assert permutation_test([0, 1, 2], [3, 4, 5], alternative="greater") == 1.0
    assert (
        permutation_test([3, 4, 5], [0, 1, 2], pairs=True) == 2 / 8
        and permutation_test([3, 4, 5], [0, 1, 2], pairs=True, alternative="greater") == 1 / 8
    )
    assert permutation_test([1, 2], [1, 2]) == 1.0 and permutation_test([1, 2], [1, 2], pairs=True) == 1.0


@pytest.mark.parametrize("pairs", [False, True], ids=["apart", "pairs"])
@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_permutations_against_scipy(pairs, alternative):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(3).normal([[0.5], [0.0]], 1, (2, 6))
    want = stats.permutation_test(
        (a, b),
        lambda x, y: np.mean(x) - np.mean(y),
        permutation_type="samples" if pairs else "independent",
        alternative=alternative,
    ).pvalue
    assert permutation_test(a, b, pairs=pairs, alternative=alternative) == pytest.approx(want)
    assert permutation_test(a, b, pairs=pairs, alternative=alternative, draws=60) == pytest.approx(
        want, abs=0.2
    )  # drawn


def test_drawn_permutations():
    a, b = np.random.default_rng(4).normal([[1.0], [0.0]], 1, (2, 30))
    for pairs in (False, True):
        assert permutation_test(a, b, pairs=pairs, draws=999) == permutation_test(a, b, pairs=pairs, draws=999) < 0.05
        assert permutation_test(a + 100, b, pairs=pairs, draws=999) == 1 / 1000  # never 0


def test_permutations_refuse():
    for a, b, kw, words in (
        ([], [1], {}, "hold values, not 0 and 1"),
        ([1], [1, 2], dict(pairs=True), "as many of each, not 1 and 2"),
        ([1], [2], dict(alternative="less"), "alternative"),
    ):
        with pytest.raises(ValueError, match=words):
            permutation_test(a, b, **kw)


def test_proportions():
    seen = [proportion_test(k, 100, 0.7) for k in (70, 77, 78)]
    assert [round(s.z, 4) for s in seen] == [0.0, 1.5275, 1.7457]
    assert [round(s.exact, 4) for s in seen[1:]] == [0.0755, 0.0479] and seen[0].normal == 0.5
    assert binomial_tail(0, 5, 0.2) == 1 and binomial_tail(6, 5, 0.2) == 0 and binomial_tail(3, 3, 1) == 1
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5) and binomial_tail(1, 3, 0.0) == 0
    for bad in ((0, 0, 0.5), (3, 2, 0.5), (1, 2, 0.0), (1, 2, 1.0)):
        with pytest.raises(ValueError, match="must be"):
            proportion_test(*bad)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_intraclass_correlation():
    assert intraclass_correlation([[1, 1], [0, 0], [1, 1]]) == pytest.approx(1)
    assert intraclass_correlation([[0, 1], [0, 1]]) == pytest.approx(-1)
    assert math.isnan(intraclass_correlation([[1, 1], [1, 1]]))
    rng = np.random.default_rng(0)
    rates = rng.beta(0.7 * 4, 0.3 * 4, 4000)  # correlation 1 / (1 + 4)
    drawn = [rng.random(8) < r for r in rates]
    assert intraclass_correlation(drawn) == pytest.approx(0.2, abs=0.02)
    with pytest.raises(ValueError, match="clusters"):
        intraclass_correlation([[1], [0]])
    counts = np.bincount([int(sum(drawn[2 * i]) + sum(drawn[2 * i + 1])) for i in range(2000)], minlength=17) / 2000
    assert np.abs(counts - clustered_counts(0.7, 2, 8, 0.2)).max() < 0.03


def test_power():
    assert proportion_power(0.8, 0.7, clusters=100) == pytest.approx(0.74, abs=0.005)
    assert proportion_power(0.7, 0.7, clusters=100) == pytest.approx(binomial_tail(78, 100, 0.7))
    assert proportion_power(0.7, 0.7, clusters=10, size=10) == pytest.approx(binomial_tail(78, 100, 0.7))
    loose = proportion_power(0.7, 0.7, clusters=10, size=10, correlation=0.2)
    assert loose > 0.1 and clustered_counts(0.7, 10, 10, 0.2).sum() == pytest.approx(1)
    assert proportion_power(0.7, 0.7, clusters=10, size=10, correlation=1e-6) == pytest.approx(0.0479, abs=1e-3)
    assert (np.arange(21) * clustered_counts(0.7, 4, 5, 0.3)).sum() == pytest.approx(14)
    for bad in (dict(p=1.0), dict(correlation=1.0), dict(clusters=0)):
        with pytest.raises(ValueError, match="must be"):
            clustered_counts(**dict(p=0.5, clusters=2, size=2) | bad)


def test_exponent():
    exact = fitted_exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert exact.slope == pytest.approx(2) and exact.error == pytest.approx(0, abs=1e-12) and exact.n == 4
    two = fitted_exponent([10, 1000], [1, 10])
    assert two.slope == pytest.approx(0.5) and math.isnan(two.error) and str(two) == "0.5 (2 sizes)"
    bent = fitted_exponent(
        [1, math.e, math.e**2], [1, 1, math.e**3]
    )  # logs 0, 0, 3 over 0, 1, 2: slope 1.5, residuals 1/2, -1, 1/2
    assert (
        bent.slope == pytest.approx(1.5)
        and bent.error == pytest.approx(math.sqrt(1.5 / 2))
        and str(bent) == "1.5 ± 0.87 (3 sizes)"
    )


def test_exponent_against_scipy():
    x, y = np.random.default_rng(5).uniform(1, 100, (2, 9))
    want = pytest.importorskip("scipy.stats").linregress(np.log(x), np.log(y))
    found = fitted_exponent(x, y)
    assert (found.slope, found.error) == pytest.approx((want.slope, want.stderr))


@pytest.mark.parametrize(
    "x, y",
    [([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1]), ([0, 1], [1, 1]), ([1, 2], [1, -1]), ([1, 2], [0, 1])],
    ids=str,
)
def test_no_exponent(x, y):
    with pytest.raises(ValueError, match="x and y must hold as many positive numbers"):
        fitted_exponent(x, y)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1) and rank_correlation(
        [1, 2, 3], [3, 2, 1]
    ) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    a, b = np.random.default_rng(6).integers(0, 5, (2, 40))
    assert rank_correlation(a, b) == pytest.approx(pytest.importorskip("scipy.stats").spearmanr(a, b).statistic)


_at = lambda minute, device="H200", **kw: dict(date=f"2026-01-01T10:{minute:02d}:00+00:00", device=device, **kw)


def test_newest():
    rows = [_at(1, n=1, ms=5), _at(0, n=2, ms=6), _at(0, n=1, ms=7), _at(2, n=2, ms=8), _at(2, n=2, ms=9)]
    assert (
        [r["ms"] for r in newest(rows, "n")] == [5, 9]
        and [r["ms"] for r in newest(rows)] == [9]
        and newest([], "n") == []
    )


def test_newest_run():
    rows = [_at(40, ms=4), _at(0, ms=1), _at(2, ms=2), _at(39, "A100", ms=0), _at(50, ms=5)]
    assert (
        [r["ms"] for r in newest_run(rows)] == [4, 5]
        and [r["ms"] for r in newest_run(rows, 9)] == [5]
        and newest_run([]) == []
    )
    assert [r["ms"] for r in newest_run(rows, 38)] == [1, 2, 4, 5]


def test_newest_recipe():
    rows = [_at(5, ms=1), _at(0, ms=2, recipe=2), _at(1, ms=3, recipe=1), _at(0, ms=4, recipe=2)]
    assert [r["ms"] for r in newest_recipe(rows)] == [2, 4]
    assert [r["ms"] for r in newest_recipe([rows[0], rows[2]])] == [1, 3] and newest_recipe(iter([])) == []


def _row(method, ms, n=1, minute=0, device="H200", torch="2.11", **kw):
    return _at(minute, device, method=method, n=n, ms_fwd=ms, versions={"torch": torch}, **kw)


def test_speedup_over_the_fastest_peer():
    rows = [
        _row("ours", 2.0),
        _row("compiled", 6.0),
        _row("flex", 4.0),
        _row("eager", None),
        _row("ours", 1.0, 2),
        _row("flex", 0.5, 2),
    ]
    first, second = speedups(rows, "n")
    assert first == Speedup("n=1", 2.0, "ours", "flex", ("eager",)) and second == Speedup(
        "n=2", 0.5, "ours", "flex", ()
    )
    assert str(first) == "n=1: 2x flex (eager failed)"
    assert [s.ratio for s in speedups(rows, "n", peers=["compiled"])] == [3.0]
    assert [s.ratio for s in speedups(rows, "n", ours=["flex"])] == [0.5, 2.0]  # peers: all others


def test_speedup_of_our_fastest():
    rows = [_row("ours", 2.0), _row("ours compiled", 1.0), _row("timm", 5.0)]
    assert speedups(rows, "n") == [Speedup("n=1", 5.0, "ours compiled", "timm")]
    assert speedups(rows, "n", ours=["ours"], peers=["timm"])[0].ratio == 2.5


def test_speedup_of_several_fields():
    rows = [_row("ours", 1.0, ms_bwd=3.0), _row("flex", 2.0, ms_bwd=10.0), _row("sdpa", 1.0)]
    assert speedups(rows, "n", field=("ms_fwd", "ms_bwd")) == [Speedup("n=1", 3.0, "ours", "flex", ("sdpa",))]
    assert speedups(rows, "n", field=lambda r: r["ms_fwd"] ** 2)[0].ratio == 1.0
    rates = [
        dict(_row("ours", None), images=30.0),
        dict(_row("timm", None), images=20.0),
        dict(_row("timm compiled", None), images=25.0),
    ]
    assert speedups(rates, "n", field="images", more=True) == [Speedup("n=1", 1.2, "ours", "timm compiled")]


def test_speedup_where_something_failed():
    rows = [
        _row("ours", None),
        _row("flex", 1.0),
        _row("ours", 1.0, 2),
        _row("flex", math.nan, 2),
        _row("ours", None, 3),
        _row("flex", None, 3),
        _row("ours", 1.0, 4),
        _row("flex", 1.0, 5),
    ]
    assert speedups(rows, "n") == [
        Speedup("n=1", 0.0, "", "flex", ("ours",)),
        Speedup("n=2", math.inf, "ours", "", ("flex",)),
    ]
    assert speedups([], "n") == []


def test_speedup_mixes_no_devices_and_versions():
    rows = [_row("ours", 1.0, minute=1), _row("flex", 2.0, torch="2.10"), _row("compiled", 3.0)]
    assert speedups(rows, "n")[0].peer == "compiled"
    assert speedups([*rows, _row("flex", 9.0, minute=2, device="A100")], "n") == []
    assert speedups([_row("ours", 1.0), _row("flex", 8.0, torch="2.12", minute=5)], "n") == []
    with pytest.raises(ValueError, match="by must name what tells rows apart, not only n: 'ours' has two rows at n=1"):
        speedups([_row("ours", 1.0, D=64), _row("ours", 2.0, D=128), _row("flex", 3.0, D=64)], "n")
    assert [
        s.where
        for s in speedups([_row(m, 1.0, n, D=d) for n in (10, 9) for d in (64, 8) for m in ("ours", "flex")], "n", "D")
    ] == ["n=9, D=8", "n=9, D=64", "n=10, D=8", "n=10, D=64"]


@pytest.mark.parametrize(
    "rule, verdicts",
    [
        (
            at_least(3, 1.5),
            {
                3.0: "holds",
                9: "holds",
                2.9: "holds in part",
                1.5: "holds in part",
                1.4: "does not hold here",
                math.nan: "does not hold here",
            },
        ),
        (at_least(3), {3: "holds", 2.9: "does not hold here", -4: "does not hold here"}),
        (
            at_most(1.1, 1.5),
            {
                1.1: "holds",
                -2: "holds",
                1.2: "holds in part",
                1.5: "holds in part",
                1.6: "does not hold here",
                math.nan: "does not hold here",
            },
        ),
        (at_most(0), {0: "holds", -1: "holds", 0.1: "does not hold here"}),
        (
            within(1, 2, (0, 3)),
            {
                1: "holds",
                2: "holds",
                0.9: "holds in part",
                2.1: "holds in part",
                0: "holds in part",
                3: "holds in part",
                -0.1: "does not hold here",
                3.1: "does not hold here",
            },
        ),
        (within(1, 2), {1.5: "holds", 0.9: "does not hold here", 2.1: "does not hold here"}),
    ],
    ids=["at least", "at least, no part", "at most", "at most, no part", "within", "within, no part"],
)
def test_thresholds(rule, verdicts):
    assert {x: rule(x) for x in verdicts} == verdicts


def test_the_number_that_is_judged():
    m = dict(ours=5, theirs=2)
    assert (
        at_least(5, of="ours")(m)
        == at_least(2.5, of=lambda m: m["ours"] / m["theirs"])(m)
        == at_most(2, of="theirs")(m)
        == within(2, 2, of="theirs")(m)
        == "holds"
    )
    assert (
        at_least(5, of="theirs")(m) == at_most(4, of="ours")(m) == within(3, 9, of="theirs")(m) == "does not hold here"
    )


SIZES = dict(tiny=10.0, base=100.0)


@pytest.mark.parametrize(
    "tolerance, measured, want",
    [
        ({}, dict(tiny=10, base=100), "holds"),
        ({}, dict(tiny=10, base=101), ("holds in part", "base 101 against 100")),
        ({}, dict(tiny=11, base=101), ("does not hold here", "tiny 11 against 10")),
        (dict(relative=0.01), dict(tiny=10.1, base=99.0), "holds"),
        (dict(relative=0.01), dict(tiny=10.2, base=101), ("holds in part", "tiny 10.2 against 10")),
        (dict(absolute=1), dict(tiny=11, base=99), "holds"),
        (dict(absolute=1), dict(tiny=8.9, base=102), ("does not hold here", "tiny 8.9 against 10")),
        ({}, dict(tiny=10), ("holds in part", "base not there")),
        ({}, dict(tiny=10, base=100, large=1), "holds in part"),
    ],
    ids=str,
)
def test_published_numbers(tolerance, measured, want):
    assert matches(SIZES, **tolerance)(measured) == want


def test_published_lists_and_numbers():
    assert matches([20, 28])([20, 28]) == "holds" and matches([20, 28])([20, 29]) == (
        "holds in part",
        "1 29 against 28",
    )
    assert matches(36_864)(36_864) == "holds" and matches(200, relative=0.05)(211) == (
        "does not hold here",
        "211 against 200",
    )


def test_ends_of_an_interval_are_judged():
    "The end that is against the claim decides, the mean for a part of it."
    up, down = interval_at_least(0.25, 0.1), interval_at_most(0.15, 0.3)
    for values, verdicts in (
        ((0.300, 0.301), ("holds", "does not hold here")),
        ((0.1, 0.4), ("holds in part", "holds in part")),
        ((0.110, 0.111), ("holds in part", "holds")),
        ((0.050, 0.051), ("does not hold here", "holds")),
        ((0.3,), ("not measured", "not measured")),
    ):
        said = [f if isinstance(f := rule(interval(values)), str) else f[0] for rule in (up, down)]
        assert tuple(said) == verdicts, (values, said)


@pytest.mark.parametrize(
    "difference, better, as_good",
    [
        (2.1, "holds", "holds"),
        (2.0, "holds in part", "holds"),
        (0.1, "holds in part", "holds"),
        (0.0, "does not hold here", "holds"),
        (-2.0, "does not hold here", "holds"),
        (-2.1, "does not hold here", "holds in part"),
        (-4.0, "does not hold here", "holds in part"),
        (-4.1, "does not hold here", "does not hold here"),
    ],
)
def test_differences_against_the_spread(difference, better, as_good):
    assert (beyond_spread(difference, 2.0), not_worse(difference, 2.0)) == (better, as_good)


@pytest.mark.parametrize(
    "mean, least, verdict",
    [
        (0.31, 0, "holds"),
        (-0.31, 0, "does not hold here"),
        (0.29, 0, "not measured"),
        (-0.29, 0, "not measured"),
        (0.31, 0.1, "not measured"),
        (0.41, 0.1, "holds"),
        (-0.21, 0.1, "does not hold here"),
    ],
)
def test_differences_with_an_interval(mean, least, verdict):
    found = beyond_interval(least)(Interval(mean, 0.3, 5))
    assert (found if isinstance(found, str) else found[0]) == verdict


def test_undecided_says_why():
    assert beyond_interval()(Interval(0.1, 0.3, 5)) == (
        "not measured",
        "undecided: the interval of 5 seeds, -0.2 to 0.4, contains 0",
    )
    assert beyond_interval()(Interval(0.1, math.inf, 1)) == ("not measured", "undecided: one seed has no interval")
    undecided = Verdict("not measured", "undecided: one seed has no interval")
    assert undecided.word == "undecided" and undecided.said == "**undecided**: one seed has no interval"
    assert Verdict("not measured", "undecided, one seed: x").said == "**undecided**: one seed: x"
    assert Verdict("not measured", "no row").said == "**not measured**: no row" and Verdict("holds").said == "**holds**"
    open_claim = Claim("c", "1", "t", beyond_interval(), Interval(0.1, 0.3, 5))
    assert "| **undecided**: the interval of 5 seeds" in claims_table([open_claim])
    assert {Verdict(v).word for v in VERDICTS} | {"undecided"} == set(WORDS)
    assert beyond_interval()(Interval(0.4, 0.3, 2)) == "holds"
    better = beyond_interval()(paired({0: 3.0, 1: 3.1, 2: 3.2}, {0: 1.0, 1: 1.1, 2: 1.1}))
    worse = beyond_interval()(paired({0: 1.0, 1: 1.1, 2: 1.1}, {0: 3.0, 1: 3.1, 2: 3.2}))
    assert (better, worse) == ("holds", "does not hold here")


@pytest.mark.parametrize(
    "rule, ratios, verdict",
    [
        (over_range(2), {"n=1": 2.0, "n=2": 3.0}, "holds"),
        (over_range(2), {"n=1": 1.9, "n=2": 2.0}, "holds in part"),
        (over_range(2), {"n=1": 1.9, "n=2": 0.5}, "does not hold here"),
        (over_range(2, 1), {"n=1": 1.0, "n=2": 3.0}, "holds in part"),
        (over_range(2, 1), {"n=1": 0.9, "n=2": 9.0}, "does not hold here"),
        (over_range(2, 1), {"n=1": 2.0}, "holds"),
        (over_range(2), {}, "not measured"),
        (over_range(2), [], "not measured"),
    ],
)
def test_ratios_over_a_range(rule, ratios, verdict):
    assert rule(ratios)[0] == verdict


def test_reason_has_best_and_worst():
    assert over_range(2)({1024: 5.25, 65536: 0.9, 8: 1})[1] == "best 5.25x at 1024, worst 0.9x at 65536" and over_range(
        2
    )({8: 3.0}) == ("holds", "3x at 8")
    rows = [_row("ours", 1.0), _row("flex", 3.0), _row("eager", None), _row("ours", 1.0, 2), _row("flex", 1.5, 2)]
    assert over_range(1.5)(speedups(rows, "n")) == ("holds", "best 3x at n=1, worst 1.5x at n=2; failed: eager at n=1")
    assert over_range(1.5)(speedups([*rows, _row("ours", None, 3), _row("flex", 1.0, 3)], "n"))[0] == "holds in part"


@pytest.mark.parametrize(
    "slope, verdict",
    [
        (1.0, "holds"),
        (1.15, "holds"),
        (1.16, "holds in part"),
        (1.5, "holds in part"),
        (1.51, "does not hold here"),
        (0.4, "does not hold here"),
    ],
)
def test_exponents(slope, verdict):
    rule = exponent_between(0.85, 1.15, (0.5, 1.5))
    assert rule(slope) == (verdict, f"exponent {slope:g}") and rule(Exponent(slope, 0.02, 5)) == (
        verdict,
        f"exponent {slope:g} ± 0.02 (5 sizes)",
    )


def test_all_of_several_rules():
    rule = all_of(at_most(1.02, 1.1, of="rsa"), at_least(1.5, of="tensor"))
    verdicts = [rule(dict(rsa=r, tensor=t)) for r, t in ((1.0, 2.0), (1.05, 2.0), (1.0, 1.0), (1.05, 1.0))]
    assert verdicts == ["holds", "holds in part", "does not hold here", "does not hold here"]
    assert all_of(
        lambda m: ("holds in part", "a"), lambda m: ("does not hold here", "b"), lambda m: ("does not hold here", "c")
    )(0) == ("does not hold here", "b; c")
    assert all_of(lambda m: "does not hold here", not_measured("no row"))(0) == "does not hold here"
    assert all_of(lambda m: "holds in part", not_measured("no row"))(0) == ("not measured", "no row")


def test_claims_of_a_chapter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHAPTERS, "dusk", Chapter("dusk", "5_vision", "Dusk", "A et al., Dusk, arXiv 2101.00001"))
        for name, words in (("dusk", "is planned, not written yet"), ("nowhere", "unknown chapter")):
            with pytest.raises(ValueError, match=words):
                chapter_claims(name)
    assert chapter_claims("claims") == chapter_claims("cli") == chapter_claims("engine") == []
    found = chapter_claims("halo")
    assert len(found) > 5 and all(c.statement and c.judge().verdict in VERDICTS for c in found)
