"""Deletion capacity: sequences, closed forms, the simulation against a slow plain one, reading a log, recommendations."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pytest

from expunge.cli import exact as cli_exact
from expunge.core.errors import DataError, SettingError
from expunge.guarantees.exact.capacity import costs
from expunge.guarantees.exact.capacity import plots as capacity_plots
from expunge.guarantees.exact.capacity.recommend import grid, recommend
from expunge.guarantees.exact.capacity.sequences import checkpoints, choose, cyclic, longest, matching, sampling, score, surviving
from expunge.guarantees.exact.capacity.simulator import order, served, spend, table
from expunge.guarantees.exact.capacity.systems import Stream, System, merged, weights
from expunge.guarantees.exact.capacity.volumes import MAX_BYTES, read
from expunge.report.page import page

# sequences


def test_prefixes_of_the_card():
    three = cyclic(3, 3)
    assert three == ((0, 1, 2), (2, 0, 1), (1, 2, 0))
    left = surviving(three, {0})
    assert left == ((2,), (1, 2)) and longest(left) == (1, 2)
    assert surviving(left, {2}) == ((1,),) == surviving(three, {0, 2})
    assert surviving(cyclic(3, 1), {0}) == () and longest(()) == ()
    assert surviving(three, ()) == three


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_cyclic_is_balanced_for_every_budget(slices):
    for budget in range(1, math.factorial(slices) + 1):
        found = cyclic(slices, budget)
        firsts = Counter(one[0] for one in found)
        counts = [firsts[s] for s in range(slices)]
        assert len(set(found)) == budget and all(sorted(one) == list(range(slices)) for one in found)
        assert max(counts) - min(counts) <= 1


def test_matching_is_the_best_assignment_of_each_round():
    p = (0.02, 0.001, 0.012, 0.006)
    found = matching(4, 4, p)
    for k in range(2, 5):
        starts = [one[: k - 1] for one in found]
        free = [[s for s in range(4) if s not in one] for one in starts]
        best = max(sum(score([*a, s], p) for a, s in zip(starts, pick, strict=True)) for pick in itertools.product(*free) if len(set(pick)) == 4)
        assert sum(score(one[:k], p) for one in found) == pytest.approx(best, rel=1e-12)
        assert len({one[k - 1] for one in found}) == 4  # no slice twice in a round
    assert matching(4, 2, p) == found[:2] and found[0][0] == 1  # the safest slice first, the best sequences kept
    assert score((1, 0), p, t=100) == pytest.approx(0.999**100 + 2 * 0.979**100)


def test_sampling_prefers_slices_that_are_safe():
    firsts = Counter(sampling(2, 1, (0.9, 0.05), seed)[0][0] for seed in range(400))
    assert firsts[1] / 400 == pytest.approx(0.95 / 1.05, abs=0.05)
    assert sampling(3, 6, (0.1,) * 3, 1) == sampling(3, 6, (0.1,) * 3, 1) and len(set(sampling(3, 6, (0.1,) * 3, 1))) == 6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: choose("cyclical", 3, 1), "did you mean 'cyclic'"),
        (lambda: cyclic(3, 7), "only 6 sequences"),
        (lambda: cyclic(0, 1), "must be 1 or more"),
        (lambda: matching(3, 4, (0.1,) * 3), "choose cyclic or sampling"),
        (lambda: matching(3, 1, (0.1,) * 2), r"one probability per slice \(3\)"),
        (lambda: sampling(2, 1, (0.9, 0.2)), "sum 1 at most"),
    ],
)
def test_sequences_refuse(call, message):
    with pytest.raises(SettingError, match=message):
        call()


# closed forms


def test_numbers_of_the_cards():
    assert costs.epochs(20, 1) == (20,) and costs.epochs(20, 3) == (10, 10, 10) and costs.epochs(20, 10) == (3, 4, 3, 4, 4, 3, 4, 4, 3, 4)
    assert costs.passes(20, 3) == 20 and costs.passes(20, 10) == pytest.approx(20.1)
    assert costs.share(5, 6) == pytest.approx(0.1444, abs=1e-4)
    assert [costs.safe_cost([100] * 10, costs.graph(f, 10)) for f in ("isolated", "cliques", "complete")] == [100, 400, 10000]
    assert costs.safe_cost([100] * 10, costs.graph("safe", 10), [0] + [1] * 9) == 200
    assert costs.affected(1, 5) == 1 and costs.affected(4, 2) == pytest.approx(4 * (1 - 0.75**2))


def test_graphs_refuse():
    with pytest.raises(SettingError, match="shard 1 cannot read shard 1"):
        costs.checked(((), (1,)), 2)
    with pytest.raises(SettingError, match="2 shards, the design 3"):
        costs.checked(((), ()), 3)
    with pytest.raises(SettingError, match="did you mean 'cliques'"):
        costs.graph("clique", 4)
    assert costs.graph("cliques", 5, 3) == ((1, 2), (0, 2), (0, 1), (4,), (3,))


# simulation against a slow one in plain Python


def slow(design: System, cells: list[int], batches: tuple[int, ...]) -> tuple[float, float, int]:
    """Cost, shards trained again and checkpoints at the end of one run, one request after another; prefixes by `surviving`."""
    S, L, e = design.shards, design.slices, costs.epochs(design.epochs, design.slices)
    held = {(d, s): int(design.sizes[d, s]) for d in range(S) for s in range(L)}
    dead: list[set[int]] = [set() for _ in range(S)]
    cost, again, todo, turn = 0.0, 0, list(cells), 0
    while todo:
        now, todo = todo[: batches[turn % len(batches)]], todo[batches[turn % len(batches)] :]
        turn += 1
        for c in now:
            held[divmod(c, L)] -= 1
            dead[c // L].add(c % L)
        for d in sorted({c // L for c in now}):
            if design.kind == "safe":
                continue
            if design.kind == "sisa":
                (one,) = design.orders[d]
                start = len(longest(surviving([one], dead[d])))
                steps = [one[: k + 1] for k in range(start, L)]
            elif len(longest(surviving(design.orders[d], dead[d]))) < design.floor:
                steps = checkpoints(design.orders[d])
            else:
                continue
            cost += sum(e[len(p) - 1] * sum(held[d, s] for s in p) for p in steps)
            again += 1
            dead[d] = set()
        if design.kind == "safe":
            hit = {c for c in now}
            for i, out in enumerate(design.reads):
                if hit & {i, *out}:
                    cost += design.epochs * sum(held[j, 0] for j in {i, *out})
                    again += 1
    stored = S if design.kind == "safe" else sum(len(checkpoints(surviving(o, dead[d]))) for d, o in enumerate(design.orders))
    return cost, again, stored


def slow_served(design: System, cells: list[int]) -> tuple[int, int]:
    """Requests until the last and the first shard dies."""
    gone: set[int] = set()
    first = 0
    for t, c in enumerate(cells, start=1):
        gone.add(c)
        if design.kind == "safe":
            alive = [not gone & {i, *out} for i, out in enumerate(design.reads)]
        else:
            L = design.slices
            alive = [len(longest(surviving(o, {c % L for c in gone if c // L == d}))) >= design.floor for d, o in enumerate(design.orders)]
        first = first or (0 if all(alive) else t)
        if not any(alive):
            return t, first
    raise AssertionError("never died")


SMALL = [
    System("sisa", 40, 3),
    System("sisa", 41, 3, 4, epochs=7),
    System("sisa", 60, 3, 2, placing="aware", prior="exponential"),
    System("s3t", 48, 3, 3, 1),
    System("s3t", 48, 2, 3, 5, epochs=2),
    System("s3t", 50, 2, 4, 4, floor=2),
    System("s3t", 60, 2, 4, 3, placing="aware", prior="exponential", choice="matching"),
    System("s3t", 48, 2, 4, 3, floor=3, placing="contiguous", choice="sampling"),
    System("safe", 40, 4, graph="cliques"),
    System("safe", 40, 4, graph=((1,), (), (0, 1), (2,))),
]


@pytest.mark.parametrize("design", SMALL, ids=lambda d: d.name)
@pytest.mark.parametrize("kind", ["uniform", "exponential"])
def test_simulation_is_that_of_a_slow_one(design, kind):
    runs, asked = 5, 30
    for batches in ((1,), (2, 1, 4)):
        stream = Stream(kind, batches=batches)
        fast, cells = spend(design, stream, asked, runs=runs, seed=3), order(design, stream, asked, runs, seed=3).tolist()
        want = np.array([slow(design, row, batches) for row in cells]).mean(0)
        assert [fast.cost.mean * asked, fast.trained.mean, fast.storage] == pytest.approx(want.tolist(), rel=1e-12)
    n = design.records
    want = np.array([slow_served(design, row) for row in order(design, stream, n, runs, seed=3).tolist()]).mean(0)
    found = served(design, stream, runs=runs, seed=3)
    assert [found.all.mean, found.first.mean, found.open] == pytest.approx([*want, 0])


def test_the_simulation_of_the_card():
    """5 shards, 6 slices, uniform, 1000 runs: served 67.3 (36), 87.5, 99.2, 107.7, 115.2, 121.4 (37) for budgets 1..6, within 5 %."""
    card = {1: 67.3, 2: 87.5, 3: 99.2, 4: 107.7, 5: 115.2, 6: 121.4}
    found = {b: served(System("s3t", 6000, 5, 6, b), runs=1000).all for b in card}
    for b, want in card.items():
        assert found[b].mean == pytest.approx(want, rel=0.05) and found[b].mean == pytest.approx(costs.expected_served(5, 6, b), rel=0.05)
        assert found[b].low < found[b].mean < found[b].high and found[b].n == 1000
    assert found[1].sd == pytest.approx(36, rel=0.1) and found[6].sd == pytest.approx(37, rel=0.1)
    assert found[6].low >= 1.7 * found[1].mean * 0.98 and found[6].mean >= 1.7 * found[1].mean


def test_cost_per_request_follows_the_closed_form():
    design = System("sisa", 60000, 5, 6)
    found = spend(design, requests=200, runs=100)
    assert found.share.mean == pytest.approx(costs.share(5, 6), rel=0.03)  # 20 epochs make 20.2 passes; few records are gone
    together = spend(System("sisa", 60000, 8), Stream(batches=(10,)), 200, runs=100)
    assert together.trained.mean / 20 == pytest.approx(costs.affected(8, 10), rel=0.02)
    star = System("safe", 1000, 10, graph="safe", protected=(0,), epochs=1)
    assert spend(star, requests=1, runs=5).cost.mean == 199  # the deleted record is not trained on again
    assert spend(System("safe", 1000, 10, graph="complete", epochs=1), requests=1, runs=5).cost.mean == 9990


# streams


def test_adversary_hits_the_first_slices_only():
    for b in range(1, 9):
        assert served(System("s3t", 300, 5, 6, b), Stream("adversarial")).all.mean == 5 * min(b, 6)
    found = spend(System("sisa", 600, 5, 6), Stream("adversarial"), 10)
    plain = spend(System("sisa", 600, 5, 6), requests=10, runs=50)
    assert found.cost.n == 1 and found.cost.low == found.cost.high > 1.2 * plain.cost.high
    assert spend(System("s3t", 600, 5, 6, 6), Stream("adversarial"), 60).trained.mean == 10  # every sixth request
    assert spend(System("s3t", 600, 5, 6, 1), Stream("adversarial"), 60).trained.mean == 60
    cliques = served(System("safe", 100, 10, graph="cliques"), Stream("adversarial"))
    assert (cliques.all.mean, cliques.first.mean) == (5, 1)
    # in a star the harmful place is the one that all others read
    star = System("safe", 100, 10, graph="safe", epochs=1)
    assert spend(star, Stream("adversarial"), 1).cost.mean == 9 + 9 * 19
    assert spend(replace(star, protected=(0,)), Stream("adversarial"), 1).cost.mean == 19


def test_greedy_adversary_is_no_worse_than_chance():
    for d in SMALL:
        assert served(d, Stream("adversarial")).all.mean <= served(d, Stream("uniform"), runs=20).all.low + 1
        assert spend(d, Stream("adversarial"), 12).cost.mean >= 0.99 * spend(d, requests=12, runs=20).cost.mean


def test_a_known_prior_helps_and_a_requester_who_knows_it_undoes_that():
    prior, n = Stream("exponential"), 1200
    unknown, known = System("s3t", n, 4, 4, 2), System("s3t", n, 4, 4, 2, choice="matching", placing="aware", prior="exponential")
    plain, better = served(unknown, prior, runs=300).all, served(known, prior, runs=300).all
    assert better.low > 1.2 * plain.high
    assert served(known, Stream("blind")).all.mean == 4 * 2 == served(unknown, Stream("adversarial")).all.mean  # its places follow from the prior
    assert served(unknown, Stream("blind"), runs=300) == served(unknown, runs=300)  # without the seed, nothing is known
    assert served(unknown, prior, runs=300) == served(unknown, runs=300)  # at random places no skew is felt


def test_distribution_aware_split_balances_requests():
    w = weights("exponential", 600)
    assert w[0] / w[-1] == pytest.approx(20, rel=0.01)
    shard = merged(w, 5)
    mass = np.bincount(shard, w)
    assert len(mass) == 5 and mass.max() / mass.min() < 2
    halves = np.add.reduceat(w, np.arange(0, 600, 120))
    assert halves.max() / halves.min() > 5  # contiguous shards are not
    known = System("sisa", 600, 5, 3, placing="aware", prior="exponential")
    by_slice = np.bincount(known.cells, w).reshape(5, 3) / known.sizes
    assert (np.diff(by_slice) > 0).all()  # least asked for first


def test_listed_requests():
    design = System("s3t", 60, 2, 3, 1, placing="contiguous")  # places 0..5 of 10 records
    found = served(design, Stream("listed", ids=(15, 3, 40, 30)), runs=2)
    assert (found.all.mean, found.first.mean, found.open) == (4, 2, 0)
    assert served(design, Stream("listed", ids=(15, 3)), runs=2).open == 1
    assert order(design, Stream("listed", ids=(15, 3, 40)), 2, 1).tolist() == [[1, 0]]
    with pytest.raises(SettingError, match=r"3 requests: the stream has 1\.\.2"):
        spend(design, Stream("listed", ids=(15, 3)), 3)
    with pytest.raises(SettingError, match=r"records 0\.\.59"):
        served(design, Stream("listed", ids=(60,)))


def test_listed_requests_at_random_places_end_in_time():
    design = System("s3t", 60, 2, 3, 3)
    short, whole = served(design, Stream("listed", ids=(1, 2, 3)), runs=30), served(design, Stream("listed", ids=tuple(range(60))), runs=30)
    assert (short.open, short.all.mean) == (1, 3) and whole.open == 0 and whole.all.mean > 6


def test_same_seed_same_numbers_and_blocks_change_nothing(monkeypatch):
    design, stream = System("s3t", 500, 3, 4, 2), Stream("uniform")
    one = served(design, stream, runs=40, seed=5), spend(design, stream, 60, runs=40, seed=5)
    monkeypatch.setattr("expunge.guarantees.exact.capacity.simulator.BLOCK", 1700)
    assert (served(design, stream, runs=40, seed=5), spend(design, stream, 60, runs=40, seed=5)) == one
    assert served(design, stream, runs=40, seed=6) != one[0]


def test_storage_falls_and_recovers():
    found = spend(System("s3t", 600, 2, 3, 3), requests=60, runs=1, seed=1)
    assert found.storage_curve[0] < System("s3t", 600, 2, 3, 3).checkpoints == 18
    steps = np.diff(found.storage_curve)
    assert (steps < 0).any() and (steps > 0).any() and list(found.at) == list(range(1, 61)) and 0 < found.kept < 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: System("sisaa", 100), "did you mean 'sisa'"),
        (lambda: System("sisa", 9, 5, 2), "too few for 5 shards of 2 slices"),
        (lambda: System("s3t", 100, 5, 3, 1, floor=4), r"floor must be 1\.\.3"),
        (lambda: System("sisa", 100, 5, 3, 2), "for s3t, not for sisa"),
        (lambda: System("safe", 100, 5, 2), "safe has no slices"),
        (lambda: System("safe", 100, 5, protected=(5,)), "protected shard 5"),
        (lambda: Stream("skewed"), "no stream of requests 'skewed'"),
        (lambda: Stream("listed"), "need ids"),
        (lambda: Stream("listed", ids=(1, 1)), "deleted once"),
        (lambda: Stream(batches=(0,)), "1 or more"),
        (lambda: spend(System("sisa", 100), requests=101), r"the stream has 1\.\.100"),
        (lambda: served(System("sisa", 100), runs=0), "runs must be 1 or more"),
        (lambda: weights((1.0, -1.0), 5), "not negative"),
    ],
)
def test_designs_and_streams_refuse(call, message):
    with pytest.raises(SettingError, match=message):
        call()


# logs


def log(tmp_path, text: str):
    path = tmp_path / "requests.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_log_of_counts(tmp_path):
    v = read(log(tmp_path, "time,count,records\n0,2,1\n10,1,3\n\n10,1,1\n20,3,1\n"), 1000)
    assert v.batches == (2, 4, 3) and v.asked == 9 and v.days == 30
    assert v.per_month == pytest.approx(9 / 30 * 365.25 / 12) and v.low < v.per_month < v.high and v.ids == ()


def test_a_log_of_ids_with_skew(tmp_path):
    day = date(2025, 1, 1)
    ids = [*range(0, 80), *range(100, 1000, 50)]
    text = "Time, ID\n" + "".join(f"{day + timedelta(days=k)},{i}\n" for k, i in enumerate(ids)) + f"{day},5\n"
    v = read(log(tmp_path, "\ufeff" + text), 1000)
    assert v.asked == len(ids) and v.repeated == 1 and set(v.ids) == set(ids) and v.p < 1e-6 and v.top > 0.8
    assert v.shares[0] > 0.7 and sum(v.shares) == pytest.approx(1)
    even = read(log(tmp_path, "time,id\n" + "".join(f"{k},{10 * k}\n" for k in range(100))), 1000)
    assert even.p > 0.9 and even.shares == () and even.burst == pytest.approx(0, abs=0.1)
    names = read(log(tmp_path, "time,id\n" + "".join(f"{k},user-{k}\n" for k in range(100))), 1000)
    assert names.asked == 100 and math.isnan(names.p)


@pytest.mark.parametrize(
    "text, message",
    [
        ("when,id\n1,2\n", "line 1: write the columns time and either id or count, not: when, id"),
        ("", "not: nothing"),
        ("time,id,count\n", "either id or count"),
        ("time,id,who\n", "unknown or repeated column 'who'"),
        ("time,id\n", "no requests below the header"),
        ("time,id\n1,2\nsoon,3\n", "line 3: time 'soon' is neither"),
        ("time,id\n1,2\n2025-01-01,3\n", "line 3: time is a date, but a number in line 2"),
        ("time,id\n2025-01-01T00:00:00+00:00,2\n2025-01-02,3\n", "a date with time zone in line 2"),
        ("time,id\n1,2,3\n", "line 2: 3 fields, but the header has 2"),
        ("time,id\n1,\n", "line 2: id is empty"),
        ("time,count\n1,0\n", "line 2: count '0' is not a whole number"),
        ("time,count\n1,-2\n", "count '-2'"),
        ("time,count,records\n1,2,x\n", "records 'x'"),
        ("time,count\nnan,2\n", "time 'nan'"),
        ("time,count\n1,2\n1,3\n", "two times at least"),
        ("time,count\n1,2000\n2,1\n", "only 1000"),
        ("time,count\n1,999999999\n", "more than 10000000 records"),
        ('time,id\n1,"2\n', "cannot read requests.csv as CSV"),
    ],
)
def test_logs_refuse(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(log(tmp_path, text), 1000)


def test_logs_refuse_files(tmp_path):
    with pytest.raises(DataError, match=r"cannot read none\.csv"):
        read(tmp_path / "none.csv", 10)
    (tmp_path / "bytes.csv").write_bytes(b"time,id\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "bytes.csv", 10)
    with (tmp_path / "huge.csv").open("wb") as f:
        f.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match="more than 67108864"):
        read(tmp_path / "huge.csv", 10)


# recommendations


@pytest.fixture
def small(monkeypatch):
    """A grid of few shards, so that a recommendation takes no time."""
    monkeypatch.setattr("expunge.guarantees.exact.capacity.recommend.SHARDS", (2, 4))


def test_recommendation_keeps_its_limits_and_ranks(tmp_path, small):
    v = read(log(tmp_path, "time,count\n" + "".join(f"{k},1\n" for k in range(0, 300, 10))), 2000)
    plan = recommend(v, 2000, least=200, runs=10)
    totals = [o.total for o in plan.options]
    assert totals == sorted(totals) and len(totals) > 10 and {o.design.kind for o in plan.options} == {"sisa", "s3t", "safe"}
    for o in plan.options:
        assert o.least >= 200 and o.total == pytest.approx(o.setup + 12 * o.per_request.mean * v.per_month)
        assert o.reasons and (o.total < plan.retrain or o.design.kind != "sisa")
    tight = recommend(v, 2000, least=200, storage=6, passes=totals[len(totals) // 2], runs=10)
    assert 0 < len(tight.options) < len(totals) and all(o.storage <= 6 and o.total <= totals[len(totals) // 2] for o in tight.options)
    assert "more than 6 checkpoints" in tight.refused and sum(tight.refused.values()) + len(tight.options) == len(grid(2000, 200, 20))
    assert not recommend(v, 2000, least=2001, runs=10).options


def test_requests_that_come_together_cost_less(tmp_path, small):
    apart = read(log(tmp_path, "time,count\n" + "".join(f"{k},1\n" for k in range(40))), 2000)
    together = replace(apart, batches=(20, 20))
    designs = [System("sisa", 2000, 4)]
    one, two = (recommend(v, 2000, runs=10, months=2, designs=designs) for v in (apart, together))
    assert two.options[0].per_request.high < 0.4 * one.options[0].per_request.low and two.retrain < one.retrain


def test_a_skewed_log_gives_designs_that_know_the_prior(tmp_path, small):
    ids = [50 * k + j for k in range(10) for j in range(20 - 2 * k)]  # from 20 of the first 50 records down to 2 of the last
    v = read(log(tmp_path, "time,id\n" + "".join(f"{k},{i}\n" for k, i in enumerate(ids))), 500)
    all_of_them = grid(500, 50, 20, v.shares)
    pair = [d for d in all_of_them if (d.kind, d.shards, d.slices) == ("sisa", 4, 6)]
    assert [d.placing for d in pair] == ["random", "aware"] and {d.placing for d in grid(500, 50, 20)} == {"random"}
    plan = recommend(v, 500, least=50, months=1, runs=60, designs=pair)
    assert [o.design.placing for o in plan.options] == ["aware", "random"] and plan.options[0].per_request.high < plan.options[1].per_request.low
    assert "skewed" in plan.notes[2] and "undo the gain" in plan.options[0].reasons[-1]


def test_recommendation_refuses(tmp_path):
    v = read(log(tmp_path, "time,count\n0,9\n1,9\n"), 100)
    with pytest.raises(SettingError, match="take a shorter horizon"):
        recommend(v, 100)
    with pytest.raises(SettingError, match="must be 1 or more"):
        recommend(v, 100, least=0)


def test_command_writes_page_and_json(tmp_path, small, capsys):
    path = log(tmp_path, "time,id\n" + "".join(f"{k},{10 * k}\n" for k in range(0, 100, 2)))
    cli_exact.plan(str(path), records=1000, shard_least=100, months=3, out=str(tmp_path / "out"), runs=5)
    text = capsys.readouterr().out
    assert " 1. " in text and "per month" in text and "checkpoints" in text
    document = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert document["options"][0]["design"]["records"] == 1000 and "ids" not in document["volumes"]
    shown = (tmp_path / "out" / "plan.html").read_text()
    assert shown.count("<svg") == 2 and "http" not in shown.replace("http://www.w3.org", "") and document["options"][0]["name"] in shown
    cli_exact.plan(str(path), records=1000, shard_least=100, months=3, as_json=True, runs=5)
    assert json.loads(capsys.readouterr().out) == document
    with pytest.raises(SettingError, match="--stream needs --records"):
        cli_exact.plan(str(path), records=0)


def test_plots_show_each_design_and_stream():
    rows = table([System("sisa", 200, 2), System("s3t", 200, 2, 3, 3)], [Stream("uniform"), Stream("adversarial")], requests=20, runs=5)
    plots = capacity_plots.compared(rows)
    assert [bool(svg) for _, svg in plots] == [True] * 3
    assert all(name in plots[0][1] for name in ("sisa 2 shards", "s3t 2 shards x 3 slices, budget 3", "uniform", "adversarial"))
    assert "mathdefault" not in plots[1][1]
    assert capacity_plots.bars({}, "x") == "" == capacity_plots.curves({})
    assert "<script>" not in page("<script>", ["<script>"], ["<script>"], [["<script>"]], [])
