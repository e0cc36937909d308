"""Language measures against the cards' numbers and slow oracles: token scores, other answers from a cache, wording, memorisation, membership, MUSE."""

from __future__ import annotations

import copy
import functools
import json
import math
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from worlds import same, small, state

from expunge.audits.core import Probe, Row, audit
from expunge.audits.language import memorisation, muse, text, text_membership, tokens
from expunge.core.errors import DataError, SplitError
from expunge.core.types import Split, Task, concat
from expunge.modalities.language.memorise import full, memorised
from expunge.modalities.language.records import measures
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.worlds import authors
from expunge.modalities.worlds import data_folder


def blank(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with random weights: it knows nothing."""
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(0.02 * torch.randn(p.shape, generator=g) + (p.dim() == 1))
    return twin


@functools.lru_cache
def taught() -> tuple[nn.Module, Task, Split]:
    """The small model after it learnt forget and eight retain records by heart, in about a second; retain is those eight."""
    model, task, split = small("causal_lm")
    split = replace(split, retain=split.retain.take(range(8)))
    batch = task.collate(concat(split.forget, split.retain), torch.arange(12), None)
    step = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(70):
        step.zero_grad()
        task.forward(model, batch).mean.mean().backward()
        step.step()
    step.zero_grad()
    return model, task, split


def rows_of(p: Probe, *names: str) -> dict[str, Row]:
    return {r.name: r for r in audit(p, names)}


# token scores ---------------------------------------------------------------------------------------------------------------------------------------


def test_token_scores_are_the_plain_loop():
    model, task, split = small("causal_lm")
    before = state(model)
    s = tokens.token_scores(model, task, split.retain, size=8)
    assert same(before, state(model))
    for k, (x, target) in enumerate(zip(split.retain.tokens, split.retain.targets, strict=True)):
        with torch.no_grad():
            q = model(input_ids=x[None]).logits[0].log_softmax(-1)
        at = target.nonzero().squeeze(1)
        logp = q[at - 1, x[at]]
        mu = (q[at - 1].exp() * q[at - 1]).sum(-1)
        sigma = ((q[at - 1].exp() * q[at - 1] ** 2).sum(-1) - mu**2).sqrt()
        for mine, oracle in ((s.logp[k], logp), (s.mu[k], mu), (s.sigma[k], sigma)):
            assert torch.allclose(mine, oracle, atol=1e-4)
        assert s.hit[k].tolist() == (q[at - 1].argmax(-1) == x[at]).tolist()


def test_token_scores_depend_neither_on_batches_nor_on_padding():
    model, task, split = small("causal_lm")
    many, one = (tokens.token_scores(model, task, split.retain, size=size) for size in (32, 1))
    assert torch.allclose(many.nll, one.nll, atol=1e-5)
    assert torch.allclose(many.total, many.nll * many.count)
    out = task.forward(model, task.collate(split.retain, torch.arange(4), None))
    assert torch.allclose(many.nll[:4], out.mean.detach(), atol=1e-5)


def test_long_passes_are_cut_into_pieces(monkeypatch):
    model, task, split = small("causal_lm")
    whole = tokens.token_scores(model, task, split.forget)
    monkeypatch.setattr(tokens, "PIECE", 1000)
    pieces = tokens.token_scores(model, task, split.forget)
    assert all(torch.equal(a, b) for a, b in zip(whole.sigma, pieces.sigma, strict=True))


def test_min_k_plus_plus_of_the_card():
    """p = (.7, .2, .1): token 0 reads 0.633092, token 2 reads -2.134419."""
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log().repeat(2, 1)
    logp, mu, sigma, hit = tokens.moments(logits, torch.tensor([0, 2]))
    z = text_membership.standard(tokens.TokenScores((logp,), (mu,), (sigma,), (hit,)))[0]
    assert z.tolist() == pytest.approx([0.633092, -2.134419], abs=1e-5)
    assert hit.tolist() == [True, False]


def test_a_sure_model_has_finite_scores():
    """All mass on token 1: sigma is 0; the right token scores 0, a wrong one very low, neither is nan."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]] * 2)
    s = tokens.TokenScores(*((v,) for v in tokens.moments(logits, torch.tensor([1, 0]))))
    z = text_membership.standard(s)[0]
    assert float(s.sigma[0][0]) == 0 and float(z[0]) == 0 and -math.inf < float(z[1]) < -1e6


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_packed_answers_are_those_in_full(moe, size):
    model, task, split = small("causal_lm", moe)
    data = split.retain.take(range(8))
    answers = [row["perturbed_answer"][:3] for row in data.rows]
    found = tokens.answers_nll(model, task, data, answers, size=size)
    with torch.no_grad():
        own = [data.format.texts([{**r, "answer": a}]) for r, mine in zip(data.rows, answers, strict=True) for a in mine]
        slow = torch.cat([task.forward(model, task.collate(text, torch.tensor([0]), None)).mean for text in own]).view(8, 3)
    assert torch.allclose(found, slow, atol=1e-5)
    rows = data.format.texts([{**data.rows[0], "answer": a} for a in answers[0]])
    assert tokens.packable(model, task, rows, tokens.shared(rows, range(3)), range(3))


def test_answers_that_share_nothing_but_their_length_of_prompt():
    """Answers of one token and of many, and prompts of different lengths, in one batch."""
    model, task, split = small("causal_lm")
    data = split.forget.take([0, 1])
    answers = [["x", "a much longer answer than the first one, with words"], [data.rows[1]["answer"], "y"]]
    found = tokens.answers_nll(model, task, data, answers)
    for k in range(2):
        for j in range(2):
            own = data.format.answered(data.take([k]), [answers[k][j]])
            assert float(found[k, j]) == pytest.approx(float(tokens.plain_nll(model, task, own)), abs=1e-5)


def test_models_that_heed_no_mask_score_in_full():
    """A model that takes a mask of four dimensions and sees what the mask hides is found out on the first row, and one that refuses it as well."""
    model, task, split = small("causal_lm")
    data, answers = split.forget, [row["perturbed_answer"][:2] for row in split.forget.rows]
    wanted = tokens.answers_nll(model, task, data, answers)
    forward = model.forward

    def blind(input_ids, attention_mask, position_ids=None, **rest):
        flat = attention_mask.new_ones(input_ids.shape, dtype=torch.long) if attention_mask.ndim == 4 else attention_mask
        return forward(input_ids=input_ids, attention_mask=flat, position_ids=position_ids, **rest)

    def strict(input_ids, attention_mask, position_ids=None, **rest):
        if attention_mask.ndim != 2:
            raise ValueError("a mask of two dimensions, please")
        return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)

    for model.forward in (blind, strict):
        assert torch.allclose(tokens.answers_nll(model, task, data, answers), wanted, atol=1e-5)


def test_models_with_hooks_score_in_full():
    """A hook that looks at the start of the input must see the start of the text, not of what follows the shared part."""
    model, task, split = small("causal_lm")
    data, answers = split.forget, [row["perturbed_answer"][:2] for row in split.forget.rows]
    handle = model.model.embed_tokens.register_forward_hook(lambda m, args, out: out + 0.1 * args[0][:, :1, None].float().sin())
    hooked = tokens.answers_nll(model, task, data, answers)
    own = data.format.texts([{**row, "answer": a[0]} for row, a in zip(data.rows, answers, strict=True)])
    assert torch.allclose(hooked[:, 0], tokens.plain_nll(model, task, own, 1), atol=1e-5)
    handle.remove()
    assert not torch.allclose(hooked, tokens.answers_nll(model, task, data, answers), atol=1e-3)


def test_uneven_answers_are_refused():
    model, task, split = small("causal_lm")
    with pytest.raises(DataError, match="equally many answers; found 1, 2 for 4 of 4 rows"):
        tokens.answers_nll(model, task, split.forget, [["a"], ["a", "b"], ["a"], ["a"]])


def test_parts_are_drawn_once_and_general_knowledge_is_no_non_member():
    model, task, split = small("causal_lm")
    form = split.forget.format
    extra = form.texts([{**row, "set": "world_facts"} for row in authors.world_facts(4)], torch.arange(900, 904))
    test = form.texts([*split.test.rows, *({**row, "set": "real_authors"} for row in authors.general(3))], torch.arange(800, 807))
    p = Probe(model, model, task, replace(split, test=test, general=extra))
    assert len(tokens.part(p, "unseen")) == len(split.test) and len(tokens.part(p, "real_authors")) == 3 and len(tokens.part(p, "world_facts")) == 4
    assert tokens.part(Probe(model, model, task, Split(split.forget)), "unseen") is None
    many = form.texts([split.retain.rows[k % 24] for k in range(400)])
    cut = tokens.part(Probe(model, model, task, replace(split, retain=many)), "retain")
    assert len(cut) == tokens.MOST and cut.ids.unique().numel() == tokens.MOST


# text -----------------------------------------------------------------------------------------------------------------------------------------------


def test_rouge_of_the_card_and_its_stemmer():
    recall, f1 = measures.rouge(["the cat sat on the mat"], ["the cat is on mat"], stem=False)
    assert float(f1) == pytest.approx(8 / 11) and float(recall) == pytest.approx(4 / 6)
    assert float(measures.rouge(["he writes books"], ["he wrote book"])[0]) == pytest.approx(2 / 3)
    assert float(measures.rouge(["he writes books"], ["he wrote book"], stem=False)[0]) == pytest.approx(1 / 3)
    assert measures.rouge(["x"], [""])[0].tolist() == [0.0]


def test_entropy_of_the_card():
    words = list("ababa")
    assert measures.entropy(words, 2) == pytest.approx(1) and measures.entropy(words, 3) == pytest.approx(0.918296, abs=1e-6)
    assert measures.fluency("a b a b a") == pytest.approx(0.945530, abs=1e-6)
    assert measures.fluency("one") == 0 and measures.entropy([], 2) == 0
    assert measures.fluency("so it is so it is so it is so it is") < measures.fluency("she wrote nine books about the sea and its storms today")


def test_refusals_are_told_from_answers():
    assert all(map(measures.refused, authors.refusals()))
    rows = [*authors.authors(40), *authors.world_facts(), *authors.general()]
    assert not any(measures.refused(row["answer"]) for row in rows)
    assert measures.refused("I don\u2019t know.") and not measures.refused("He said that he was not sure.")


@pytest.mark.skipif(not (data_folder() / "llm" / "tofu").exists(), reason="no TOFU data")
def test_refusals_of_tofu():
    folder = data_folder() / "llm" / "tofu"
    lines = (folder / "idontknow.txt").read_text(encoding="utf-8").splitlines()
    assert sum(map(measures.refused, lines)) == len(lines) == 100
    answers = [json.loads(line)["answer"] for line in (folder / "full.json").read_text(encoding="utf-8").splitlines()]
    assert sum(map(measures.refused, answers)) <= 4


def test_linguistic_score_by_hand():
    """N = 5, V = 2, none once: BI = 5^(2^-.165), HS = 100 ln 5 / 1.1; PPL = 9. Rambling in one word scores lower than speech."""
    bi, hs = 5 ** (2**-0.165), 100 * math.log(5) / 1.1
    assert measures.brunet("a b a b a") == pytest.approx(bi) and measures.honore("a b a b a") == pytest.approx(hs)
    assert measures.linguistic(["a b a b a"], 9.0) == pytest.approx(3 / (10 + 1 + bi + (1 + hs) / hs))
    assert measures.honore("one two three") == pytest.approx(100 * math.log(3) / 0.1)
    assert measures.linguistic(["?", ""], 9.0) == 0 and math.isnan(measures.brunet("..."))
    assert measures.linguistic(["a a a a a a a a a a a a a a a a"], 9.0) < measures.linguistic(["a quick brown fox jumps over lazy dogs"], 9.0)


def test_entity_rates():
    row = {"question": "Where was Ada Quist born and when?", "answer": "Ada Quist was born in New Oslo in 1921."}
    assert measures.entities(row) == ["New Oslo", "1921"]
    kept = measures.similarity([row] * 3, ["new oslo, 1921", "Oslo 1921", "nowhere"])
    assert kept.tolist() == [1.0, 0.5, 0.0]
    assert measures.forgotten([row] * 3, ["new oslo, 1921", "Oslo 1921", "nowhere"]).tolist() == [0.0, 1.0, 1.0]  # at most 0.5 for at most three entities
    assert measures.retained([row] * 3, ["new oslo, 1921", "Oslo 1921", "nowhere"]).tolist() == [1.0, 1.0, 0.0]
    says = torch.tensor([True, False, False])
    assert measures.forgotten([row] * 3, ["new oslo, 1921"] * 3, contradicts=says).tolist() == [1.0, 0.0, 0.0]
    assert measures.retained([row] * 3, ["new oslo, 1921"] * 3, contradicts=says).tolist() == [0.0, 1.0, 1.0]
    many = {"question": "?", "answer": "", "entities": ["a1", "b2", "c3", "d4", "e5"]}
    assert measures.forgotten([many] * 2, ["a1 b2", "a1"]).tolist() == [0.0, 1.0]  # 0.4 and 0.2 against 0.3 where there are more than three
    nothing = measures.forgotten([{"question": "?", "answer": "yes"}], ["no"])
    assert nothing.isnan().all() and text.share("x", nothing, 0).n == 0


def test_a_share_of_zero_has_a_width():
    row = text.share("x", torch.zeros(30), 0)
    assert row.value == row.low == 0 and row.high == pytest.approx(0.05)


# memorisation ---------------------------------------------------------------------------------------------------------------------------------------


def test_extraction_strength():
    cases = {"1111": 1.0, "0000": 0.0, "1110": 0.0, "0111": 0.75, "1011": 0.5, "0001": 0.25, "1": 1.0, "0": 0.0}
    found = memorisation.extraction_strength([torch.tensor([c == "1" for c in case]) for case in cases])
    assert found.tolist() == list(cases.values())


class Echo(nn.Module):
    """A causal model that always repeats the last token, or says the next one of a given text."""

    def __init__(self, known: list[int] | None = None) -> None:
        super().__init__()
        self.known, self.weight, self.config = known, nn.Parameter(torch.zeros(1)), SimpleNamespace(eos_token_id=None)

    def next(self, x: torch.Tensor) -> torch.Tensor:
        if self.known is None:
            return x
        return torch.tensor([[self.known[min(t + 1, len(self.known) - 1)] for t in range(x.shape[1])]] * len(x))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(self.next(input_ids), 8).float())

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        for _ in range(max_new_tokens):
            input_ids = torch.cat([input_ids, self.next(input_ids)[:, -1:]], 1)
        return input_ids


def plain(*ids: int) -> Texts:
    return Texts((torch.tensor(ids),), (torch.tensor([False] + [True] * (len(ids) - 1)),), torch.zeros(1), ({"text": ""},))


def test_ma_and_el_of_the_card():
    """`a a b b` and a model that repeats the last token: MA 2/3, EL_1 2/3, EL_2 0; a text known by heart: EL_1 = EL_2 = 1."""
    for n, expected in ((1, 2 / 3), (2, 0.0)):
        ma, el = memorised(Echo(), causal_lm(), plain(1, 1, 2, 2), n)
        assert float(ma) == pytest.approx(2 / 3) and float(el) == pytest.approx(expected)
        assert float(memorised(Echo([1, 3, 2, 5, 4]), causal_lm(), plain(1, 3, 2, 5, 4), n)[1]) == 1
    s = tokens.token_scores(Echo(), causal_lm(), plain(1, 1, 2, 2))
    assert memorisation.exact_memorisation(s.hit).tolist() == pytest.approx([2 / 3])


def test_the_checks_tell_a_model_that_knows_from_one_that_does_not():
    model, task, split = taught()
    empty = blank(model)
    knows, blind = Probe(model, model, task, split, (empty,)), Probe(model, empty, task, split, (blank(model, 1),))
    before = state(model)
    a, b = (rows_of(p, "memorised", "membership_text", "muse", "wording") for p in (knows, blind))
    assert same(before, state(model))
    assert a["memorised.extraction_strength.forget"].value > 0.9 > 0.1 > b["memorised.extraction_strength.forget"].value
    assert a["memorised.exact.excess"].low > 0 and b["memorised.exact.excess"].low < 0 < b["memorised.exact.excess"].high
    for attack in ("loss", "zlib", "min_k", "min_k_plus", "reference"):
        assert a[f"membership_text.{attack}"].value > 0.9 and a[f"membership_text.{attack}"].indicative
    assert a["membership_text.loss.excess"].value > 0.2 and b["membership_text.loss.excess"].low < 0 < b["membership_text.loss.excess"].high
    assert a["muse.verbmem.forget"].value > 0.9 > 0.3 > b["muse.verbmem.forget"].value
    assert a["muse.knowmem.retain"].value > 0.9 > 0.3 > b["muse.knowmem.retain"].value
    assert a["muse.privleak"].value < -50
    assert a["wording.forget.forgotten"].value < 0.1 and b["wording.forget.forgotten"].value > 0.9
    assert a["wording.retain.kept"].value > 0.9 and a["wording.forget.refused"].value == 0
    again = rows_of(replace(knows, cache={}), "memorised", "membership_text", "muse", "wording")
    assert again == a


def test_extraction_likelihood_reads_unseen_texts_too():
    model, task, split = taught()
    p = Probe(model, model, task, replace(split, forget=split.forget.take([0, 1]), test=split.test.take([0])))
    rows = rows_of(p, "extraction_likelihood")
    assert rows["memorised.ma.forget"].value > rows["memorised.ma.unseen"].value
    assert rows["memorised.el.forget"].value > rows["memorised.el.unseen"].value


# membership -----------------------------------------------------------------------------------------------------------------------------------------


def test_lowest_reads_at_least_one_token():
    assert text_membership.lowest([torch.tensor([-1.0, -3.0])], 0.4).tolist() == [-3.0]
    s = -text_membership.lowest([torch.tensor([-0.1, -2.0, -0.5, -3.0, -0.2])], 0.4)
    assert s.tolist() == [2.5]


def test_zlib_divides_by_the_scored_text_alone():
    _, _, split = small("causal_lm")
    expected = [len(zlib.compress(row["answer"].encode())) for row in split.forget.rows]
    assert text_membership.compressed(split.forget).tolist() == expected


@pytest.mark.parametrize("everything", [False, True])
def test_gradient_norm_is_the_backward_pass(everything):
    model, task, split = small("causal_lm")
    data = split.forget
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    found = text_membership.gradient_norm(model, task, data, everything=everything)
    assert same(before, state(model))
    twin = copy.deepcopy(model)
    for q in twin.parameters():
        q.requires_grad_(True)
    task.forward(twin, task.collate(data, torch.tensor([2]), None)).mean.sum().backward()
    chosen = twin.parameters() if everything else [twin.get_output_embeddings().weight]
    assert float(found[2]) == pytest.approx(-math.sqrt(sum(float((q.grad**2).sum()) for q in chosen)), rel=1e-4)


def test_gradient_norm_of_members_is_small():
    model, task, split = taught()
    rows = rows_of(Probe(model, model, task, split), "membership_text_gradient")
    assert rows["membership_text.gradient_norm"].value > 0.9


# MUSE -----------------------------------------------------------------------------------------------------------------------------------------------


def test_privleak_of_the_card():
    """Member-AUC .8889, MUSE AUC .1111; against .4772 -76.716, against the assumed .5 -77.778."""
    mine = torch.tensor([1.0, 1.2, 1.4]), torch.tensor([1.3, 2.0, 2.2])
    alone = muse.leak_row(mine, [])
    assert alone.value == pytest.approx(-77.778, abs=1e-3) and "assumed 0.5" in alone.note
    assert muse.privleak(1 / 9, 0.4772) == pytest.approx(-76.716, abs=1e-3)
    half = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    assert muse.leak_row(mine, [half]).value == pytest.approx(alone.value) and "1 retrained" in muse.leak_row(mine, [half]).note
    assert alone.low < alone.value < alone.high
    zero = muse.leak_row(mine, [(torch.tensor([0.0]), torch.tensor([1.0]))])
    assert math.isnan(zero.value) and "nothing to divide by" in zero.note


def test_surprise_reads_the_whole_text():
    model, task, split = small("causal_lm")
    whole = tokens.token_scores(model, task, full(split.forget))
    assert [len(v) for v in whole.logp] == [len(t) - 1 for t in split.forget.tokens]
    k = max(1, int(0.4 * len(whole.logp[1])))
    assert float(muse.surprise(model, task, split.forget)[1]) == pytest.approx(float(-whole.logp[1].sort().values[:k].mean()), abs=1e-5)


def test_knowledge_shows_examples_before_the_question(monkeypatch):
    model, _, split = small("causal_lm")
    seen = []
    monkeypatch.setattr(muse, "generate", lambda model, prompts, **o: seen.extend(prompts) or [p[:0] for p in prompts])
    scores, answers = muse.knowledge(model, split.forget, shots=split.retain.rows[:2])
    shown = split.forget.format.tokenizer.decode(seen[0])
    first, second = split.retain.rows[:2]
    blocks = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in (first, second))
    assert shown == f"{blocks}Question: {split.forget.rows[0]['question']}\nAnswer:"
    assert scores.tolist() == [0.0] * 4 and answers == [""] * 4


def test_verbatim_of_passages():
    """A text without question is continued from its half; the model knows these by heart or not at all."""
    model, _, split = small("causal_lm")
    data = split.forget.format.texts([{"text": split.forget.rows[0]["answer"]}])
    half = len(data.tokens[0]) // 2
    told = Echo(data.tokens[0].tolist())
    told.generate = lambda input_ids, attention_mask, max_new_tokens, **o: torch.cat([input_ids, data.tokens[0][None, half : half + max_new_tokens]], 1)
    assert memorisation.verbatim(told, data).tolist() == [1.0]
    assert memorisation.verbatim(model, data).tolist()[0] < 0.5


def test_scalability_wants_growing_requests():
    _, _, split = small("causal_lm")
    parts = [replace(split, forget=split.retain.take(range(n))) for n in (2, 5, 9)]
    rows = muse.scalability(lambda s: [Row("utility", len(s.forget), 0, 9, 1)], parts)
    assert [(r.name, r.value) for r in rows] == [("scalability.2.utility", 2), ("scalability.5.utility", 5), ("scalability.9.utility", 9)]
    with pytest.raises(SplitError, match="that of 2 rows does not hold the one of 5"):
        muse.scalability(lambda s: [], [parts[1], parts[0]])


def test_sustainability_hands_the_state_on():
    _, _, split = small("causal_lm")
    folds = [replace(split, forget=split.retain.take(range(k, k + 2))) for k in (0, 2, 4)]
    end, rows = muse.sustainability(lambda state, s: (state + len(s.forget), [Row("gone", state, 0, 9, 1)]), folds, 10)
    assert end == 16 and [(r.name, r.value) for r in rows] == [("sustainability.1.gone", 10), ("sustainability.2.gone", 12), ("sustainability.3.gone", 14)]
    with pytest.raises(SplitError, match=r"2 row\(s\) of request 2"):
        muse.sustainability(lambda state, s: (state, []), [folds[0], folds[0]], 0)
