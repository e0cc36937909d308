"""UPCORE: cases of card upcore, states at the right token, and the check that no pruned item is forgotten about."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from worlds import same, state

from expunge.core.errors import DataError, SettingError, SplitError
from expunge.core.files import seal_json
from expunge.core.types import Split
from expunge.data.language.coreset import KINDS, Core, beyond, likelihood, likely, question_states, readd, reduced, select, spread, survivors, trapezoid, upcore
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.worlds import tiny
from expunge.modalities.language.worlds.authors import authors

ROWS = authors(6, per=5)
TOKENIZER = tiny.tokenizer(ROWS, 400)
FORM = Format(TOKENIZER)
MODEL = tiny.llama(len(TOKENIZER), width=16, layers=3, heads=2)
DATA = FORM.texts(ROWS)
TASK = causal_lm(TOKENIZER)


def split() -> Split:
    return Split(DATA.take(range(20)), DATA.take(range(20, 25)), validation=DATA.take(range(25, 30)))


def cloud(n: int = 60, d: int = 8, out: tuple[int, ...] = (5, 17, 40)) -> torch.Tensor:
    h = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    h[list(out)] += 12 * torch.randn(len(out), d, generator=torch.Generator().manual_seed(9)).sign()
    return h


def test_variance_of_the_card():
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    assert spread(points) == pytest.approx(6.666667, abs=1e-6)
    assert spread(points, unbiased=False) == 5.0
    assert spread(points[:1]) == spread(points[:0]) == 0.0
    assert spread(points + 1e6) == pytest.approx(spread(points))
    assert spread(cloud()) == pytest.approx(float(torch.cov(cloud().double().T).trace()))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "random"])
def test_the_outlier_of_the_card_is_dropped(kind):
    h = torch.cat([0.01 * torch.randn(10, 1, generator=torch.Generator().manual_seed(1)), torch.tensor([[100.0]])])
    core = select(h, kind=kind, contamination=1 / 11)
    assert core.pruned == (10,) and core.kept == tuple(range(10))
    assert core.variance_before > 800 and core.variance_after < 0.01


def test_area_of_the_card():
    assert trapezoid([0, 0.5, 1], [1, 0.8, 0.2]) == pytest.approx(0.7)
    assert trapezoid([1, 0, 0.5], [0.2, 1, 0.8]) == pytest.approx(0.7)  # checkpoints may come in any order
    for bad in (([0], [1]), ([0, 1], [1])):
        with pytest.raises(SettingError, match="a curve needs two or more points"):
            trapezoid(*bad)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "random"])
def test_planted_outliers_are_pruned_and_variance_falls(kind):
    core = select(cloud(), kind=kind, contamination=0.05)
    assert core.pruned == (5, 17, 40)
    assert core.variance_after < core.variance_before / 3
    assert core.variance_after == pytest.approx(spread(cloud()[list(core.kept)]))


def test_only_distance_by_covariance_sees_an_item_far_out_along_one_axis():
    h = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    h[5, 0] = 12.0
    assert select(h, kind="mahalanobis", contamination=0.05).scores[5] == max(select(h, kind="mahalanobis", contamination=0.05).scores)
    assert 5 not in select(h, kind="forest", contamination=0.05).pruned


def test_the_random_control_prunes_as_many_and_others():
    found = [select(cloud(), kind="random", contamination=0.05, seed=s) for s in range(4)]
    assert all(len(c.pruned) == 3 for c in found) and len({c.pruned for c in found}) > 1
    assert found[0] == select(cloud(), kind="random", contamination=0.05, seed=0)


@pytest.mark.parametrize("n", [5, 11, 31])
def test_every_kind_prunes_as_many_as_scikit_learn_does(n):
    from sklearn.ensemble import IsolationForest

    h = cloud(n, 3, ())
    forest = IsolationForest(contamination=0.1, random_state=42).fit(h.double().numpy())
    out = torch.tensor(forest.predict(h.double().numpy()) == -1).nonzero().flatten().tolist()
    assert list(select(h).pruned) == out
    assert {len(select(h, kind=k).pruned) for k in KINDS} == {len(out)}


def test_groups_are_judged_each_by_itself():
    h = torch.cat([cloud(20, 4, (3,)), 1000 + cloud(20, 4, (7,)), 5 * cloud(1, 4, ())])
    labels = ["a"] * 20 + ["b"] * 20 + ["alone"]
    core = select(h, kind="mahalanobis", contamination=0.05, groups=labels)
    assert core.pruned == (3, 27) and core.scores[40] == 0.0
    parts = [spread(h[:20]), spread(h[20:40]), 0.0]
    assert core.variance_before == pytest.approx((20 * parts[0] + 20 * parts[1]) / 41)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(2))
    mixed = select(h[order], kind="mahalanobis", contamination=0.05, groups=[labels[k] for k in order])
    assert sorted(order[list(mixed.pruned)].tolist()) == [3, 27]


def test_states_are_those_of_the_last_question_token_at_the_penultimate_block():
    got = question_states(MODEL, DATA, size=7)
    for k in (0, 8, 29):
        ids = TOKENIZER(f"Question: {ROWS[k]['question']}")["input_ids"]
        assert TOKENIZER.decode(ids[-1:]).endswith("?")  # not the colon of "Answer:"
        with torch.no_grad():
            want = MODEL(input_ids=DATA.tokens[k][None], output_hidden_states=True).hidden_states[2][0, len(ids) - 1]
        assert torch.equal(DATA.tokens[k][: len(ids)], torch.tensor(ids))
        torch.testing.assert_close(got[k], want, atol=1e-6, rtol=1e-5)


def test_states_do_not_depend_on_the_batch_nor_on_the_answer():
    whole = question_states(MODEL, DATA)
    alone = torch.cat([question_states(MODEL, DATA.take([k])) for k in range(5)])
    torch.testing.assert_close(whole[:5], alone, atol=1e-6, rtol=1e-5)
    other = FORM.answered(DATA, ["The answer is long and not the same at all."] * len(DATA))
    assert torch.equal(question_states(MODEL, other), whole)


def test_a_chat_template_and_plain_texts_have_states_too():
    chat = Format(TOKENIZER, template="chat").texts(ROWS[:3])
    ids = TOKENIZER("User: " + ROWS[1]["question"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        want = MODEL(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
    torch.testing.assert_close(question_states(MODEL, chat, layer="model.layers.0")[1], want, atol=1e-6, rtol=1e-5)
    texts = FORM.texts([{"text": row["answer"]} for row in ROWS[:3]])
    assert question_states(MODEL, texts).shape == (3, 16)


def test_the_record_is_deterministic_and_returns_from_disk(tmp_path):
    core = upcore(MODEL, split().forget, contamination=0.2)
    assert core == upcore(MODEL, split().forget, contamination=0.2) and len(core.pruned) == 4 and core.data == split().forget.digest
    assert sorted(core.kept + core.pruned) == list(range(20))
    path = core.save(tmp_path / "core.json")
    assert Core.load(path, split().forget) == core
    with pytest.raises(SplitError, match="the core was made for other forget data: 20 items"):
        Core.load(path, DATA)
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "kept": found["kept"][1:]}))
    with pytest.raises(DataError, match=r"core\.json was changed after it was written"):
        Core.load(path)
    path.write_text(seal_json({**{k: v for k, v in found.items() if k != "sha256"}, "kept": found["kept"][1:]}))
    with pytest.raises(DataError, match=r"core\.json is damaged: kept and pruned are not all items, each once"):
        Core.load(path)
    path.write_text(seal_json({}))
    with pytest.raises(DataError, match=r"cannot read core\.json as a core: 'kept'"):
        Core.load(path)


def test_groups_come_from_a_field_of_the_records():
    core = upcore(MODEL, DATA, group="author", contamination=0.25)
    assert [sum(k // 5 == a for k in core.pruned) for a in range(6)] == [1] * 6
    with pytest.raises(DataError, match="record 1 has no field 'topic' to be grouped by"):
        upcore(MODEL, DATA, group="topic")


def test_the_model_is_left_alone():
    MODEL.train()
    try:
        before = state(MODEL)
        upcore(MODEL, DATA)
        assert same(before, state(MODEL))
    finally:
        MODEL.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "forst"}, "no kind of core 'forst'; did you mean 'forest'? There are: forest, mahalanobis, lof, random"),
        ({"contamination": 0.0}, "contamination must be above 0 and at most 0.5, not 0"),
        ({"contamination": 0.6}, "contamination must be above 0 and at most 0.5, not 0.6"),
        ({"groups": ["a"]}, "1 groups for 60 items"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SettingError) as error:
        select(cloud(), **settings)
    assert str(error.value) == message


@pytest.mark.parametrize("states", [torch.zeros(0, 3), torch.zeros(4), torch.full((4, 2), torch.nan)])
def test_bad_states_are_refused(states):
    with pytest.raises(SettingError, match="states must be"):
        select(states)


def test_pruned_items_that_survive_are_put_back_and_no_others():
    request = split()
    core = upcore(MODEL, request.forget, contamination=0.3)
    small = reduced(request, core)
    assert small.forget.ids.tolist() == [request.forget.ids[k] for k in core.kept] and small.retain is request.retain
    half = set(core.pruned[::2])

    def known(model, task, data):
        assert data.ids.tolist() == list(core.pruned)  # the check looks at pruned items alone
        return torch.tensor([k in half for k in data.ids.tolist()])

    again = readd(MODEL, TASK, request, core, known)
    assert again.forget.ids.tolist() == sorted({*core.kept, *half})
    assert readd(MODEL, TASK, request, core, likely(0.0)).forget.ids.tolist() == list(range(20))  # all survive: the whole request
    assert readd(MODEL, TASK, request, core, likely(1.1)).forget.ids.tolist() == list(core.kept)
    nothing = replace(core, kept=tuple(range(20)), pruned=())
    assert survivors(MODEL, TASK, request, nothing) == ()


def test_an_item_is_known_if_its_answer_is_likelier_than_unseen_answers():
    request = split()
    p, unseen = likelihood(MODEL, TASK, request.forget, size=3), likelihood(MODEL, TASK, request.validation)
    slow = torch.stack([(-TASK.forward(MODEL, TASK.collate(request.forget, torch.tensor([k]), None)).mean).exp().detach() for k in range(20)]).flatten()
    torch.testing.assert_close(p, slow, atol=1e-7, rtol=1e-5)
    assert beyond(request.validation, 0.5)(MODEL, TASK, request.forget).tolist() == (p > unseen.median()).tolist()
    core = upcore(MODEL, request.forget, contamination=0.3)
    assert survivors(MODEL, TASK, request, core) == tuple(k for k in core.pruned if p[k] > unseen.quantile(0.95))


def test_the_per_item_check_needs_unseen_records_and_the_same_request():
    request = split()
    core = upcore(MODEL, request.forget)
    with pytest.raises(SplitError, match="split lacks validation"):
        readd(MODEL, TASK, replace(request, validation=None), core)
    for call in (lambda s: reduced(s, core), lambda s: readd(MODEL, TASK, s, core)):
        with pytest.raises(SplitError, match="the core was made for other forget data"):
            call(replace(request, forget=request.retain))
