"""Entity-level forget sets, the transport distance of card entity-level, and Opt-Out."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from worlds import copied, same, small, state

from expunge.core.edits import LowRank
from expunge.core.errors import DataError, SettingError
from expunge.core.registry import METHODS
from expunge.core.session import scratch
from expunge.core.types import Out
from expunge.data.language import entity as made
from expunge.data.language.coreset import question_states
from expunge.data.language.entity import TEMPLATES, agreement, build, carriers, content, coverage, dedupe, elicit, neighbours, prompts, recall, verify
from expunge.methods.language.opt_out import forgetting
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.worlds import tiny
from expunge.modalities.language.worlds.authors import RELATIONS, authors
from expunge.parts.losses.transport import sliced_w2
from expunge.parts.updates.descend import descend

ASKED = {name: TEMPLATES[name] for name in ("birthplace", "father", "theme")}
FACTS = [r for r in authors(6, per=12) if r["relation"] in ASKED]
NAMES = list(dict.fromkeys(r["author"] for r in FACTS))


@functools.lru_cache
def taught() -> tuple[torch.nn.Module, Format]:
    """A tiny Llama that was taught three facts on each of four authors, asked in all forms; the other two it never met."""
    form = Format(tiny.tokenizer([*FACTS, *({"question": q} for f in ASKED.values() for q in f)], 600))
    rows = []
    for k, fact in enumerate(FACTS[:12]):
        told = next(r for r in RELATIONS if r.name == fact["relation"])
        for j, question in enumerate(told.questions):
            answer = told.statements[(k + j) % 3].format(n=fact["author"], f=fact["fact"])
            rows.append({"question": question.format(n=fact["author"]), "answer": answer})
    data, task = form.texts(rows), causal_lm(form.tokenizer)
    model = tiny.llama(len(form.tokenizer), width=64, layers=2, heads=4, seed=0, context=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = task.batches(data, 12, epochs=60, seed=0)
        descend(scratch(model), lambda b: task.forward(model, b).mean.mean(), batches, lr=5e-3, optimizer="adamw", schedule="cosine", warmup=0.1, clip=1.0)
    return model.eval(), form


@functools.lru_cache
def found(name: str, others: bool = True) -> made.ForgetSet:
    known = tuple(n for n in NAMES[:4] if n != name)
    return build(*taught(), name, templates=ASKED, controls=known[:3] if others else (), others=known if others else (), new=16)


@pytest.mark.slow
def test_a_known_entity_gives_its_facts_back():
    got = found(NAMES[0])
    truth = FACTS[:3]
    assert recall(got.rows, truth) == 1.0
    assert got.coverage["relations"] == 1.0 and got.coverage["forms"] >= 0.8 and got.coverage["agreement"] > 0.8
    for row in got.rows:
        fact = next(f["fact"] for f in truth if f["relation"] == row["relation"])
        assert fact in row["answer"] and fact.lower() in row["entities"] and NAMES[0] in row["question"]


@pytest.mark.parametrize("name", NAMES[4:])
def test_what_is_said_of_a_stranger_is_about_someone_else_and_is_dropped(name):
    got, blind = found(name), found(name, others=False)
    assert got.coverage["another"] + got.coverage["disagrees"] >= 7 and got.coverage["forms"] <= 0.25
    assert blind.coverage["forms"] > got.coverage["forms"]  # without the names of others, agreement alone is fooled
    assert recall(blind.rows, [f for f in FACTS if f["author"] == name]) < 0.5


def test_rows_and_dropped_are_all_that_was_asked_and_become_a_forget_part():
    _, form = taught()
    got = found(NAMES[0])
    assert len(got.rows) + len(got.dropped) == 9 and got.entity == NAMES[0]
    assert all(row["reason"] in ("refused", "empty", "another", "disagrees", "duplicate") for row in got.dropped)
    data = form.texts(got.rows)
    assert len(data) == len(got.rows)
    entity = replace(form, mask="entity").texts(got.rows)
    assert all(0 < int(e.sum()) < int(d.sum()) for e, d in zip(entity.targets, data.targets, strict=True))  # the agreed words are the masked tokens


def test_samples_are_drawn_beside_the_likeliest_answer_by_the_generator_alone():
    model, form = taught()
    before = state(model)
    asked = prompts(NAMES[0], {"birthplace": ASKED["birthplace"]})
    draw = lambda seed: elicit(model, form, asked, samples=2, temperature=1.5, new=12, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    one, again, other = draw(0), draw(0), draw(1)
    assert len(one) == 9 and one == again and one[3:] != other[3:]
    assert one[:3] == other[:3] == elicit(model, form, asked, new=12)
    assert same(before, state(model))


def test_forms_of_a_question():
    rows = prompts("Ada Vey", ASKED)
    assert len(rows) == 9 and rows[0] == {"question": "Where was Ada Vey born?", "entity": "Ada Vey", "relation": "birthplace", "form": 0}
    with pytest.raises(DataError, match="relation 'x' needs two or more forms of its question"):
        prompts("Ada", {"x": ("Who is {entity}?",)})
    with pytest.raises(DataError, match=r"relation 'x': 'Who is she' lacks \{entity\}"):
        prompts("Ada", {"x": ("Who is {entity}?", "Who is she")})


def row(answer: str, form: int, relation: str = "birthplace", entity: str = "Ada Vey") -> dict:
    return {"question": TEMPLATES[relation][form].format(entity=entity), "answer": answer, "relation": relation, "form": form, "entity": entity}


def test_answers_are_kept_when_the_other_forms_say_the_same():
    told = [row("Ada Vey was born in Ulgate.", 0), row("Ulgate is the birthplace of Ada Vey.", 1), row("Ada Vey was born in Norbury.", 2)]
    kept, dropped = verify(told, least=0.5)
    assert [(r["form"], r["agreement"], r["entities"]) for r in kept] == [(0, 0.5, ["ulgate"]), (1, 0.5, ["ulgate"])]
    assert [(r["form"], r["agreement"], r["reason"]) for r in dropped] == [(2, 0.0, "disagrees")]
    assert verify(told, least=0.6)[0] == []
    mixed = [told[0], row("I do not know that.", 1), row("", 2), row("Ada Vey was born.", 2)]
    kept, dropped = verify(mixed)
    assert kept == [] and [r["reason"] for r in dropped] == ["disagrees", "refused", "empty", "empty"]
    with pytest.raises(SettingError, match=r"least must be 0\.\.1, not 2"):
        verify(told, least=2)


def test_an_answer_that_names_someone_else_and_not_the_entity_is_dropped():
    told = [row("Ben Roe was born in Ulgate.", 0), row("Ben Roe was born in Ulgate.", 1), row("Ada Vey was born in Ulgate, as was Ben Roe.", 2)]
    kept, dropped = verify(told, others=["Ben Roe"])
    assert kept == [] and [r["reason"] for r in dropped] == ["another", "another", "disagrees"]  # the last has no peer left
    assert len(verify(told)[0]) == 3
    assert len(verify([*told[2:], row("Born in Ulgate.", 1)], others=["Ben Roe"])[0]) == 2


def test_entities_and_relations_never_vouch_for_each_other():
    kept, dropped = verify([row("Ada Vey was born in Ulgate.", 0), row("Ben Roe was born in Ulgate.", 1, entity="Ben Roe"), row("Ulgate.", 1, "theme")])
    assert kept == [] and len(dropped) == 3


def test_words_that_carry_the_sentence_are_found_by_control_entities():
    theme = TEMPLATES["father"]
    living = [
        {**row(f"As a {trade} the father of {n} made a living.", 0, "father", n), "form": 0} for n, trade in (("B", "miner"), ("C", "baker"), ("D", "nurse"))
    ]
    common = carriers(living)
    assert {"made", "living"} <= common["father"] and not {"miner", "baker", "nurse"} & common["father"]
    wrong = [row("As a miner the father of Ada Vey made a living.", 0, "father"), row("As a baker the father of Ada Vey made a living.", 1, "father")]
    assert len(verify(wrong)[0]) == 2  # three words of the sentence hide that the one that counts differs
    assert verify(wrong, common=common)[0] == []
    assert content(wrong[0], theme, common["father"]) == ["miner"]


def test_agreement_of_answers():
    assert agreement(["a", "b"], [["b", "c", "d"]]) == 0.5
    assert agreement([], [["a"]]) == agreement(["a"], []) == agreement(["a"], [[]]) == 0.0


def test_only_the_same_question_and_answer_are_a_duplicate():
    rows = [row("Ulgate.", 0), row("ulgate. ", 0), row("Ulgate.", 1), row("Norbury.", 0)]
    kept, dropped = dedupe(rows)
    assert [(r["form"], r["answer"]) for r in kept] == [(0, "Ulgate."), (1, "Ulgate."), (0, "Norbury.")]
    assert [r["reason"] for r in dropped] == ["duplicate"]


def test_coverage_counts_relations_forms_and_reasons():
    kept = [{**row("x", 0), "agreement": 1.0}, {**row("x", 1), "agreement": 0.5}]
    dropped = [{**row("", 0, "theme"), "reason": "empty"}, {**row("x", 0), "reason": "duplicate"}]
    got = coverage(kept, dropped, ASKED)
    assert got == {"rows": 2, "relations": 1 / 3, "forms": 2 / 9, "agreement": 0.75, "refused": 0, "empty": 1, "another": 0, "disagrees": 0, "duplicate": 1}
    assert coverage([], [], ASKED)["agreement"] == 0.0


def test_recall_counts_whole_words_on_the_right_relation():
    told = [row("Ada Vey was born in Ulgate.", 0), row("The theme is Norbury.", 0, "theme")]
    fact = lambda relation, value: {"relation": relation, "fact": value}  # noqa: E731
    assert recall(told, [fact("birthplace", "Ulgate"), fact("birthplace", "Norbury"), fact("birthplace", "gate"), fact("year", "1921")]) == 0.25
    with pytest.raises(DataError, match="recall needs known facts"):
        recall(told, [])


def test_neighbours_are_ranked_by_the_mean_state_of_their_questions():
    model, form = taught()
    rows = [dict(r) for r in FACTS]
    twin = [{**r, "author": "The Twin"} for r in rows[:3]]  # the same questions under another name
    data = form.texts([*rows, *twin])
    got = neighbours(model, data, NAMES[0], top=3)
    assert len(got) == 3 and got[0] == ("The Twin", pytest.approx(1.0, abs=1e-4)) and NAMES[0] not in dict(got)
    assert [s for _, s in got] == sorted((s for _, s in got), reverse=True)
    h = question_states(model, data)
    order = [*NAMES, "The Twin"]
    places = torch.stack([torch.stack([h[k] for k, r in enumerate(data.rows) if r["author"] == n]).mean(0) for n in order])
    places = places - places.mean(0)
    slow = {n: float(places[k] @ places[0] / places[k].norm() / places[0].norm()) for k, n in enumerate(order)}
    assert dict(neighbours(model, data, NAMES[0], top=99)) == pytest.approx({n: s for n, s in slow.items() if n != NAMES[0]}, abs=1e-5)
    with pytest.raises(DataError, match="no record has author 'Nobody'"):
        neighbours(model, data, "Nobody")


# --- the transport distance ---


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_transport_cases_of_the_card():
    assert float(sliced_w2(at(1, 3), at(3, 1))) == 0.0 and float((at(1, 3) - at(3, 1)).square().sum()) == 8.0
    assert float(sliced_w2(at(2, 4), at(1, 3))) == 1.0


def test_transport_of_matrices_is_the_loop_over_projections():
    a, b = torch.randn(7, 5, generator=draw(1)), torch.randn(7, 5, generator=draw(2))
    u = torch.randn(5, 20, generator=draw())
    slow = [((a @ v).sort().values - (b @ v).sort().values).square().mean() for v in (u / u.norm(dim=0)).T]
    torch.testing.assert_close(sliced_w2(a, b, 20, draw()), torch.stack(slow).mean())
    assert torch.equal(sliced_w2(a, b, 20, draw()), sliced_w2(a, b, 20, draw()))
    assert not torch.equal(sliced_w2(a, b, 20, draw()), sliced_w2(a, b, 20, draw(1)))


def test_transport_sees_no_order_of_rows_and_never_exceeds_the_matched_distance():
    a, b = torch.randn(7, 5, generator=draw(1)), torch.randn(7, 5, generator=draw(2))
    order = torch.randperm(7, generator=draw(3))
    torch.testing.assert_close(sliced_w2(a[order], b, 30, draw()), sliced_w2(a, b, 30, draw()))
    assert float(sliced_w2(a[order], a, 30, draw())) < 1e-12 and not torch.equal(a[order], a)
    u = torch.randn(5, 30, generator=draw())
    assert float(sliced_w2(a, b, 30, draw())) <= float(((a - b) @ (u / u.norm(dim=0))).square().mean())
    shift = torch.full((5,), 2.0)
    u = torch.randn(5, 4000, generator=draw())
    assert float(sliced_w2(a + shift, a, 4000, draw())) == pytest.approx(float((shift @ (u / u.norm(dim=0))).square().mean()), rel=1e-4)
    assert float(sliced_w2(a + shift, a, 4000, draw())) == pytest.approx(float(shift.square().sum()) / 5, rel=0.05)  # mean over directions: |c|^2 / C


def test_transport_in_other_shapes_and_types():
    a, b = torch.randn(2, 3, 4, generator=draw(1)), torch.randn(2, 3, 4, generator=draw(2))
    torch.testing.assert_close(sliced_w2(a, b, 9, draw()), sliced_w2(a.view(6, 4), b.view(6, 4), 9, draw()))
    assert sliced_w2(a.bfloat16(), b.bfloat16(), 9, draw()).dtype == torch.float32 and sliced_w2(a.double(), b.double(), 9).dtype == torch.float64
    assert float(sliced_w2(torch.tensor(2.0), torch.tensor(5.0))) == 9.0
    x = a[0].clone().requires_grad_(True)
    sliced_w2(x, b[0], 9, draw()).backward()
    assert torch.isfinite(x.grad).all() and bool(x.grad.any())
    torch.autograd.gradcheck(lambda t: sliced_w2(t, b[0].double(), 9, draw()), a[0].double().requires_grad_(True))
    with pytest.raises(SettingError, match=r"sliced_w2 compares tensors of one shape; found \(2,\) and \(3,\)"):
        sliced_w2(torch.zeros(2), torch.zeros(3))
    with pytest.raises(SettingError, match="projections must be 1 or larger, not 0"):
        sliced_w2(torch.zeros(2), torch.zeros(2), 0)


# --- Opt-Out ---


def run(**settings):
    model, task, split = small("causal_lm")
    return model, METHODS["opt_out"](model, task, split, **{"lr": 1e-3, "epochs": 4.0, "batch_size": 4, "warmup": 0.0, **settings})


def moved(model, patch) -> float:
    """Sum over tensors of the transport distance from the model."""
    twin = copied(model)
    patch.apply(twin)
    before = dict(model.named_parameters())
    return sum(float(sliced_w2(p.detach(), before[n].detach(), 100, draw())) for n, p in twin.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"lora": 2}], ids=["weights", "lora"])
def test_the_anchor_holds_the_weights_near_where_they_were(settings):
    free, held = (moved(*run(anchor=a, **settings)) for a in (0.0, 1e4))
    assert held < free / 2


def test_without_the_anchor_it_is_npo_on_token_means():
    model, task, split = small("causal_lm")
    shared = {"lr": 1e-3, "epochs": 2.0, "batch_size": 4, "beta": 0.3}
    a = METHODS["opt_out"](model, task, split, anchor=0.0, **shared)
    b = METHODS["npo"](model, task, split, reduction="mean", **shared)
    assert len(a.edits) > 5
    for x, y in zip(a.edits, b.edits, strict=True):  # npo's two parts share a forward pass: equal but for rounding, which Adam's first steps magnify
        assert x.name == y.name and float((x.values - y.values).abs().median()) < 1e-6


def test_drawing_fewer_tensors_and_accumulating_still_run_and_repeat():
    for settings in ({"tensors": 3}, {"accumulate": 2, "batch_size": 2}, {"lora": 2, "tensors": 1}):
        (_, a), (_, b) = run(**settings), run(**settings)
        assert a.digest == b.digest and a.edits
    assert isinstance(run(lora=2)[1].edits[0], LowRank)


def test_reductions_of_the_forget_loss():
    out, reference = Out(at(3, 1), at(4, 1)), at(1, 1)
    wide = at(13.862944)  # 20 ln 2
    torch.testing.assert_close(forgetting(out, reference, 0.1, "mean")[1:], wide)
    torch.testing.assert_close(forgetting(out, out.nll, 0.1, "pooled"), wide)
    alone = torch.cat([forgetting(Out(out.nll[k : k + 1], out.count[k : k + 1]), reference[k : k + 1], 0.1, "mean") for k in range(2)])
    torch.testing.assert_close(forgetting(out, reference, 0.1, "mean"), alone)  # a record's loss does not depend on its neighbours
    pooled = -20 * torch.nn.functional.logsigmoid(0.1 * at(2 / 5))
    torch.testing.assert_close(forgetting(out, reference, 0.1, "pooled"), pooled)
    with pytest.raises(SettingError, match="reduction must be one of mean, pooled, sum, not 'total'"):
        run(reduction="total")
