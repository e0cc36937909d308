"""Records that stand twice: under one id, under another target, or nearly."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from worlds import digits, small

from expunge import Examples, Pictures, Probe, Split, Texts, classification
from expunge.core.errors import RecipeError, SplitError
from expunge.core.modality import MODALITIES, Request
from expunge.core.types import concat
from expunge.modalities import near
from expunge.modalities.files import requests
from expunge.modalities.language import near as texts
from expunge.modalities.worlds import world
from expunge.planning import outcome, recipe
from expunge.planning.outcome import copies
from expunge.report import html, table


def examples(n: int, first: int = 0, classes: int = 3) -> Examples:
    g = torch.Generator().manual_seed(first)
    return Examples(torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % classes, first + torch.arange(n))


def parts() -> Split:
    return Split(examples(6), examples(12, 100), examples(5, 200), examples(4, 300))


def with_rows(split: Split, part: str, x, y, ids) -> Split:
    """The split with these rows in place of the first of a part."""
    old = getattr(split, part)
    n = len(y)
    put = lambda new, whole: torch.cat([torch.as_tensor(new), whole[n:]])  # noqa: E731
    return replace(split, **{part: replace(old, x=put(x, old.x), y=put(y, old.y), ids=put(ids, old.ids))})


# ---- under another target -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["retain", "test", "validation"])
def test_a_record_under_another_target_is_a_leak(part):
    split = parts()
    split.check()
    leaking = with_rows(split, part, split.forget.x[2:4], split.forget.y[2:4] + 1, [900, 901])
    what = rf"2 record\(s\) of forget also stand in {part} under another target \(a leak\), the first has id 2;"
    with pytest.raises(SplitError, match=what + (" remove them, or say that retain holds corrections" if part == "retain" else " remove them")):
        leaking.check()
    named = replace(leaking, **{p: replace(getattr(leaking, p), x={"a": getattr(leaking, p).x}) for p in leaking.parts()})
    with pytest.raises(SplitError, match=what):
        named.check()


def test_corrected_records_may_stay_and_no_more():
    """What was taught wrongly is forgotten, and the same input with its right label is kept; never tested on, and never the same record."""
    split = parts()
    x, y = split.forget.x[:2], split.forget.y[:2]
    kept = replace(with_rows(split, "retain", x, y + 1, [900, 901]), corrected=True)
    kept.check()
    assert set(kept.parts()) == set(split.parts())
    for part, leaking in {
        "retain": with_rows(kept, "retain", x, y, [900, 901]),
        "test": with_rows(kept, "test", x, y + 2, [900, 901]),
        "validation": with_rows(kept, "validation", x, y + 2, [900, 901]),
    }.items():
        with pytest.raises(SplitError, match=f"of forget also stand in {part}"):
            leaking.check()


def test_corrections_from_the_command_line_and_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.py").write_text("import torch\ndef data():\n    x = torch.eye(8)[[0, 1, 2, 3, 0, 1]]\n    return x, torch.tensor([0, 1, 0, 1, 1, 0])\n")
    given = {o.name: o.default for o in MODALITIES["classification"].options}
    request = Request("", "ids:0,1", {**given, "train": "py:rows:data"})
    with pytest.raises(SplitError, match="say that retain holds corrections"):
        requests.split(request, "classification").check()
    requests.split(replace(request, options={**request.options, "corrected": True}), "classification").check()
    sys.modules.pop("rows")
    text = 'model = "py:m:f"\ntrain = "t"\nforget = "f"\n'
    for value, wanted in (("true", True), ("false", False)):
        (tmp_path / "r.toml").write_text(f"{text}corrected = {value}\n")
        assert recipe.read(tmp_path / "r.toml").options["corrected"] is wanted
    for line in ("corrected = 1", "seed = true"):
        (tmp_path / "r.toml").write_text(f"{text}{line}\n")
        with pytest.raises(RecipeError, match="must be of type"):
            recipe.read(tmp_path / "r.toml")


def test_the_same_target_is_told_as_before():
    split = parts()
    with pytest.raises(SplitError, match=r"1 record\(s\) of forget also stand in test \(a leak\); remove them from one of the two"):
        with_rows(split, "test", split.forget.x[:1], split.forget.y[:1], [900]).check()


def test_targets_that_are_records_of_their_own_are_no_labels():
    """Of models from image to image, inputs may coincide where what tells them apart is hidden: the target is the record."""
    split = parts()
    whole = replace(split, **{p: replace(part, x=torch.zeros(len(part), 1, 2, 2), y=part.x) for p, part in split.parts().items()})
    whole.check()


def test_texts_and_pictures():
    """Texts: the same tokens with other targets. Pictures: the same picture under another prompt; prompts alone have nothing else to be known by."""
    split = small("causal_lm")[2]
    split.check()
    forget = split.forget.take(range(2))
    other = replace(forget, targets=tuple(~t for t in forget.targets), ids=forget.ids + 10_000)
    with pytest.raises(SplitError, match=r"2 record\(s\) of forget also stand in retain under another target"):
        replace(split, forget=forget, retain=other.joined(split.retain)).check()
    rows = tuple({"prompt": str(k)} for k in range(4))
    drawn = Pictures(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8).view(4, 2), torch.arange(4), rows)
    kept = replace(drawn, tokens=drawn.tokens + 10, ids=drawn.ids + 10)
    with pytest.raises(SplitError, match=r"4 record\(s\) of forget also stand in retain under another target"):
        Split(drawn, kept).check()
    bare = replace(drawn, x=None)
    Split(bare, replace(kept, x=None)).check()


@pytest.mark.parametrize("name", ["digits", "digits-wrong", "diabetes", "inpaint-digits", "gan-digits", "clip-digits", "text2digit", "authors"])
def test_worlds_are_clean(name):
    w = world(name)
    for scenario in w.scenarios:
        w.split(scenario).check()


# ---- under one id -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["forget", "retain", "test", "validation"])
def test_an_id_that_stands_twice_is_named(part):
    split = parts()
    ids = getattr(split, part).ids.clone()
    ids[2], n, first = ids[1], 1, int(ids[1])
    if len(ids) > 4:
        ids[4], n = ids[3], 2
    with pytest.raises(SplitError, match=rf"{n} id\(s\) stand more than once in {part}, the first is {first}:"):
        replace(split, **{part: replace(getattr(split, part), ids=ids)}).check()


def test_an_id_of_forget_and_retain_is_named():
    """A test part may count from 0 as the training data does; forget and retain are of one set of training data."""
    split = parts()
    replace(split, test=replace(split.test, ids=torch.arange(5))).check()
    with pytest.raises(SplitError, match=r"1 id\(s\) stand in both forget and retain, the first is 4"):
        replace(split, retain=replace(split.retain, ids=torch.arange(4, 4 + 12 * 2, 2).where(torch.arange(12) == 0, split.retain.ids))).check()


# ---- near copies of inputs ----------------------------------------------------------------------------------------------------------------------------------


def pooled(image: np.ndarray, side: int) -> np.ndarray:
    """A thumbnail, field by field."""
    out = []
    for channel in image:
        h, w = channel.shape
        m, n = min(side, h), min(side, w)
        out += [channel[i * h // m : -(-(i + 1) * h // m), j * w // n : -(-(j + 1) * w // n)].mean() for i in range(m) for j in range(n)]
    centred = np.array(out) - np.mean(out)
    return centred / np.linalg.norm(centred) if np.abs(centred).max() > 1e-9 else 0 * centred


def slow(split: Split) -> dict[int, tuple[int, float]]:
    """Kept id -> (id to forget, likeness), all pairs one by one."""
    gone, kept = (
        [(i, *(pooled(x.double().numpy(), side) for side in (8, 16))) for x, i in zip(p.x, p.ids.tolist(), strict=True)] for p in (split.forget, split.retain)
    )
    found = {}
    for k, coarse, fine in kept:
        likely = [(float(fine @ w), i) for i, v, w in gone if coarse @ v >= 0.95]
        if likely and max(likely)[0] >= 0.98:
            found[k] = (max(likely)[1], max(likely)[0])
    return found


def altered(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is near and what is not."""
    g = torch.Generator().manual_seed(5)
    reach = x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
    half = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 2), scale_factor=2)
    return {
        "near: the same": x, "near: darker": 0.5 * x - 0.3, "near: noise": x + 0.03 * reach * torch.randn(x.shape, generator=g),
        "near: fewer levels": (x / reach * 15).round() / 15 * reach, "near: half the resolution": half,
        "mirrored": x.flip(-1), "shifted": torch.roll(x, 4, -1), "negative": -x,
    }  # fmt: skip


def scenes(n: int = 8) -> torch.Tensor:
    """(n, 3, 32, 32) smooth colours."""
    g = torch.Generator().manual_seed(2)
    return torch.nn.functional.interpolate(torch.randn(n, 3, 8, 8, generator=g), size=32, mode="bicubic")


def asked(gone: torch.Tensor, kept: torch.Tensor) -> Split:
    return Split(*(Examples(x, torch.zeros(len(x)), first + torch.arange(len(x))) for x, first in ((gone, 0), (kept, 1000))))


@pytest.mark.parametrize("name", list(altered(scenes())))
def test_what_is_near(name):
    x = scenes()
    split = asked(x, altered(x)[name])
    found = near.inputs(split)
    assert all(how == pytest.approx(slow(split)[k][1], abs=1e-4) for _, k, how in found)
    assert {k: i for i, k, _ in found} == {k: i for k, (i, _) in slow(split).items()}
    assert [(i, k) for i, k, _ in sorted(found)] == ([(i, 1000 + i) for i in range(len(x))] if name.startswith("near") else [])


@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_near_copies_in_blocks_are_those_of_all_pairs(monkeypatch, block):
    """Digits, where some drawings are near by nature, and copies among them; the same whatever fits in memory."""
    monkeypatch.setattr(near, "BLOCK", block)
    split = world("digits").split("random")
    forget, retain = split.forget.take(range(60)), split.retain.take(range(150))
    g = torch.Generator().manual_seed(0)
    copies = Examples(forget.x[:20] + 0.02 * torch.randn(20, 1, 8, 8, generator=g), forget.y[:20], 5000 + torch.arange(20))
    found, wanted = near.inputs(Split(forget, concat(retain, copies))), slow(Split(forget, concat(retain, copies)))
    assert {k: i for i, k, _ in found} == {k: i for k, (i, _) in wanted.items()} and len(wanted) >= 20
    assert all(how == pytest.approx(wanted[k][1], abs=1e-5) for _, k, how in found)
    assert [how for *_, how in found] == sorted((how for *_, how in found), reverse=True)


def test_several_copies_and_shapes():
    x = scenes(4)
    twice = near.inputs(asked(torch.cat([x[:2], x[:2] + 0.2 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))]), torch.cat([x, x])))
    assert [(i, k) for i, k, _ in twice] == [(0, 1000), (1, 1001), (0, 1004), (1, 1005)] and all(0.9999 < how <= 1 for *_, how in twice)
    assert near.inputs(asked(torch.full((2, 1, 8, 8), 0.3), torch.full((3, 1, 8, 8), 0.7))) == []  # nothing to see is like nothing
    lines = torch.randn(5, 2, 400, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    assert sorted((i, k) for i, k, _ in near.inputs(asked(lines, 2 * lines))) == [(i, 1000 + i) for i in range(5)]
    fine = 1.0 * (torch.arange(16)[:, None] + torch.arange(16) & 1).expand(1, 1, 16, 16)  # alike in the large, not in the small: not near
    slopes = asked(fine + 0.01 * torch.arange(16), fine + 0.01 * torch.arange(16)[:, None])
    assert float(near.thumbnails(slopes.forget.x, 16) @ near.thumbnails(slopes.retain.x, 16).T) > 0.98 and near.inputs(slopes) == [] and slow(slopes) == {}
    two = asked(torch.cat([slopes.forget.x, 0.01 * torch.arange(16)[:, None].expand(1, 1, 16, 16)]), slopes.retain.x)  # the other way round: near to neither
    assert near.inputs(two) == [] and slow(two) == {}
    whole = (255 * (x - x.amin()) / (x.amax() - x.amin())).to(torch.uint8)
    assert len(near.inputs(asked(whole, whole))) == 4
    for gone, kept in ((x, x[:, :1]), (torch.randn(4, 3), torch.randn(4, 3)), (torch.arange(4.0), torch.arange(4.0))):
        assert near.inputs(asked(gone, kept)) is None
    assert near.inputs(Split(asked(x, x).forget)) is None
    assert near.inputs(Split(*(Examples({"a": x}, torch.zeros(4), i + torch.arange(4)) for i in (0, 10)))) is None


def test_rows_of_a_table_are_compared_column_by_column():
    """In units of the column's spread, by a slow form; a column in thousands does not drown the others."""
    g = torch.Generator().manual_seed(4)
    kept = torch.randn(200, 10, generator=g) * 10.0 ** torch.arange(-3, 7)
    gone = torch.cat([kept[:5] + 0.05 * kept.std(0) * torch.randn(5, 10, generator=g), torch.randn(20, 10, generator=g) * 10.0 ** torch.arange(-3, 7)])
    z = [(x.double() - kept.double().mean(0)) / kept.double().std(0, correction=0) for x in (gone, kept)]
    likeness = [[1 - float((a - b).square().mean()) / 2 for a in z[0]] for b in z[1]]
    found = near.inputs(asked(gone, kept))
    assert {(i, k - 1000) for i, k, _ in found} == {(int(np.argmax(row)), k) for k, row in enumerate(likeness) if max(row) >= 0.98}
    assert {(i, k - 1000) for i, k, _ in found} == {(i, i) for i in range(5)} and all(
        how == pytest.approx(likeness[k - 1000][i], abs=1e-9) for i, k, how in found
    )


# ---- near copies of texts -----------------------------------------------------------------------------------------------------------------------------------


def said(gone: list[str], kept: list[str]) -> Split:
    return Split(*(Texts((torch.ones(2, dtype=torch.long),) * len(rows), (torch.ones(2, dtype=torch.bool),) * len(rows), first + torch.arange(len(rows)),
                         tuple({"text": t} for t in rows)) for rows, first in ((gone, 0), (kept, 1000))))  # fmt: skip


FIRST = "The harbour of Norgate is quiet in winter, when the “old” ferries lie at their berths and nobody sails."
SAME = {
    "as it is": FIRST, "capitals": FIRST.upper(), "marks": FIRST.replace(",", ";").replace("“old”", "'old'"), "spaces": FIRST.replace(" ", " \t\n"),
    "no-break": FIRST.replace(" ", "\u00a0"), "wide letters": "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in FIRST),
    "hidden": FIRST.replace("Norgate", "Nor\u200bga\u00adte\ufeff"), "selectors": FIRST.replace("Norgate", "Norgate\ufe0f"),
}  # fmt: skip


@pytest.mark.parametrize("how", SAME)
def test_words_are_the_same_however_they_are_written(how):
    assert texts.texts(said([FIRST, "Something else is written here, of no use."], ["Nothing.", SAME[how]])) == [(0, 1001, 1.0)]


def test_words_of_other_scripts():
    assert texts.words("e\u0301te\u0301 ÉTÉ") == ["été", "été"] and texts.words("Straße") == texts.words("STRASSE")
    assert texts.words("हिन्दी में") == ["हिन्दी", "में"] and texts.words("東京タワー") == list("東京タワー")
    assert texts.words("… — !? 🎉") == [] and texts.words("don't stop") == ["don", "t", "stop"] and texts.words("\ud800 a") == ["\ud800", "a"]
    assert texts.texts(said(["…", "東京の塔は高い"], ["…", "!", "東京の塔は高い。"])) == [(1, 1002, 1.0)] and texts.texts(said(["…"], ["…"])) == []
    assert texts.texts(said(["\ud800 a b c"], ["\ud800 a b c"])) == [(0, 1000, 1.0)] and texts.texts(said(["one"], ["One!", "two"])) == [(0, 1000, 1.0)]


def test_jaccard_by_hand():
    """a b c d e has shingles abc, bcd, cde; with x for e: abc, bcd, cdx: 2 shared of 4."""
    one, other = texts.shingles(list("abcde")), texts.shingles(list("abcdx"))
    assert texts.jaccard(one, other) == 0.5 and texts.shingles(["a", "b"]) == {("a", "b")} and texts.shingles([]) == set() and texts.jaccard(set(), set()) == 0


def corpus() -> tuple[list[str], list[str]]:
    """Random sentences, and kept ones that change ever more words of those to forget, shuffled among others."""
    g = np.random.default_rng(3)
    word = lambda: f"w{g.integers(400)}"  # noqa: E731
    gone = [" ".join(word() for _ in range(g.integers(1, 80))) for _ in range(60)]
    gone += [" ".join([*t.split()[:-1], word()]) for t in gone[:20]]
    kept = [" ".join(word() for _ in range(g.integers(1, 80))) for _ in range(500)]
    for _ in range(400):
        words = gone[g.integers(60)].split()
        for at in g.integers(0, len(words), g.integers(0, 6)):
            words[at] = word()
        kept.append(" ".join(words))
    return gone, [kept[k] for k in g.permutation(len(kept))]


@pytest.mark.parametrize("block", [7, 256])
def test_minhash_finds_what_all_pairs_find(monkeypatch, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    gone, kept = corpus()
    sets = [[texts.shingles(t.split()) for t in part] for part in (gone, kept)]
    wanted = {1000 + k: best for k, b in enumerate(sets[1]) if (best := max(texts.jaccard(a, b) for a in sets[0])) >= 0.8}
    found = texts.texts(said(gone, kept))
    assert {k: how for _, k, how in found} == wanted and 100 < len(wanted) < 400
    assert all(texts.jaccard(sets[0][i], sets[1][k - 1000]) == how for i, k, how in found)
    assert [(-how, k) for _, k, how in found] == sorted((-how, k) for _, k, how in found)


def test_the_share_of_equal_hashes_is_the_jaccard():
    """Within four standard deviations for each of 100 pairs, and on average within a hundredth; bands fail as seldom as they should."""
    g = np.random.default_rng(0)
    pairs = [[f"w{g.integers(5000)}" for _ in range(60)] for _ in range(100)]
    other = [[w if g.random() < 0.95 else "new" for w in p] for p in pairs]
    true = np.array([texts.jaccard(texts.shingles(p), texts.shingles(q)) for p, q in zip(pairs, other, strict=True)])
    guess = (texts.signatures(pairs) == texts.signatures(other)).mean(1)
    spread = np.sqrt(true * (1 - true) / texts.HASHES)
    assert (np.abs(guess - true) <= 4 * spread + 1e-9).all() and abs((guess - true).mean()) < 0.01
    assert (1 - 0.8**texts.ROWS) ** texts.BANDS < 1e-4 and len(np.unique(texts.bands(texts.signatures(pairs)))) == 100 * texts.BANDS


def test_many_texts_of_one_form_are_compared_in_bounds(monkeypatch):
    """A thousand texts that are all alike cost MOST comparisons each, not a thousand."""
    count = []
    monkeypatch.setattr(texts, "jaccard", lambda a, b: count.append(1) or len(a & b) / len(a | b))
    form = " ".join(f"word{k}" for k in range(40))
    found = texts.texts(said([f"{form} {k}" for k in range(300)], [f"{form} {k + 1000}" for k in range(50)]))
    assert len(found) == 50 and len(count) <= 50 * texts.MOST


def test_questions_and_answers_are_read():
    rows = [{"question": "Where is the harbour of Norgate?", "answer": "In the north, by the old sea wall, beyond the mill."}]
    split = said([FIRST], [FIRST])
    split = replace(split, forget=replace(split.forget, rows=tuple(rows)), retain=replace(split.retain, rows=tuple({**r, "fact": "x"} for r in rows)))
    assert texts.texts(split) == [(0, 1000, 1.0)] and texts.texts(replace(split, retain=None)) is None
    for key in rows[0]:
        other = replace(split.retain, rows=({**rows[0], key: "Another thing altogether, which nobody ever asked or said before now."},))
        assert texts.texts(replace(split, retain=other)) == []


# ---- in the report ------------------------------------------------------------------------------------------------------------------------------------------


def probe(split: Split) -> Probe:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    return Probe(model, model, classification(), split)


def test_a_report_names_near_copies():
    split = parts()
    assert copies(probe(split)) == {"n": 0, "pairs": [], "compared": {"forget": 6, "retain": 12}}
    noisy = split.forget.x[:2] + 0.01 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = copies(p := probe(with_rows(split, "retain", noisy, split.forget.y[:2], [900, 901])))
    assert found["n"] == 2 and sorted((gone, kept) for gone, kept, _ in found["pairs"]) == [(0, 900), (1, 901)] and copies(p) == found
    assert copies(replace(p, split=replace(split, retain=None), cache={})) is None
    assert copies(replace(p, split=replace(split, retain=list(split.retain)), cache={})) is None
    spoken = small("causal_lm")
    assert copies(Probe(spoken[0], *spoken))["n"] == 0 and copies(Probe(spoken[0], *spoken[:2], replace(spoken[2], retain=list(spoken[2].retain)))) is None


def test_more_than_can_be_compared_or_listed_is_said(monkeypatch):
    split = parts()
    split = replace(split, retain=replace(split.forget, ids=split.forget.ids + 50))
    monkeypatch.setattr(outcome, "COMPARED", 20)
    found = copies(probe(split))
    assert found["compared"] == {"forget": 3, "retain": 6} and [p[0] for p in sorted(found["pairs"])] == [0, 2, 4]
    told = table.near({"near": found, "parts": {"forget": 6}})
    assert told.startswith("3 records that you keep are near copies") and told.endswith("Only 3 of 6 records to forget were compared.")
    monkeypatch.setattr(outcome, "LISTED", 2)
    found = copies(probe(split))
    assert (found["n"], len(found["pairs"])) == (3, 2)
    many = {"near": {"n": 30, "pairs": [[k, k, 1.0] for k in range(20)]}}
    assert table.near(many).count(" alike") == 10 and "; and 20 more)" in table.near(many)
    assert [table.near(d) for d in ({}, {"near": None}, {"near": {"n": 0}}, {"near": {"n": "x"}}, {"near": []})] == [""] * 5


def test_the_note_stands_on_page_one_and_in_the_terminal():
    document = {"title": "t", "near": {"n": 1, "pairs": [[17, "<b>\x1b", 0.994]]}, "parts": {"forget": 3}}
    page = html.render(document)
    note = "1 record that you keep is a near copy of records to forget (forget 17 and keep &lt;b&gt; , 0.994 alike)"
    assert note in page and page.index(note) < page.index('class="engineer"')
    console = Console(width=400, file=io.StringIO())
    console.print(table.show(document, 400))
    assert "1 record that you keep is a near copy" in console.file.getvalue()


def test_an_audit_carries_near_copies_and_is_not_blocked():
    """The default audit of digits: the same verdict with and without; looking for them takes a few per cent of it at most."""
    model, task, split = digits("random")
    split = replace(split, retain=split.retain.joined(replace(split.forget.take([0]), x=split.forget.x[:1] * 0.9, ids=torch.tensor([70_000]))))
    start = time.perf_counter()
    verdict = outcome.audited(model, model, task, split, slow=False)
    took = time.perf_counter() - start
    start = time.perf_counter()
    document = verdict.document(pictures=False)
    assert [int(split.forget.ids[0]), 70_000] in [pair[:2] for pair in document["near"]["pairs"]] and document["verdict"]["reasons"] == verdict.reasons
    start = time.perf_counter()
    copies(replace(verdict.probe, cache={}))
    assert time.perf_counter() - start < max(0.05, 0.05 * took)
