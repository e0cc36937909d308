"""ECO, ULD, guardrails and O3: the numbers of their cards, and what each must do on small worlds."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from worlds import copied, same, small, state, toy

from expunge.audits.core import Probe, audit
from expunge.core.edits import Hook, LowRank
from expunge.core.errors import DataError, Diverged, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.hooks import WRAPS, attach, bare, guards
from expunge.core.patch import Patch
from expunge.core.registry import CHECKS, METHODS
from expunge.core.types import IGNORE, Out
from expunge.data.language.wrong import wrong_answers
from expunge.engine.run import unlearn
from expunge.methods.language.o3 import before as earlier
from expunge.methods.language.o3 import covariance, detector, left_out, orthogonality, overlap, whitened
from expunge.methods.language.uld import others, true_answers, uniform_kl
from expunge.modalities.language.guards.corrupt import corrupted
from expunge.modalities.language.guards.gate import features, linear, marker, quantile
from expunge.modalities.language.guards.gated import weights
from expunge.modalities.language.guards.offset import combine, plausible, truncated
from expunge.modalities.language.guards.refuse import matches, packed, screened
from expunge.modalities.language.guards.serve import serve
from expunge.modalities.language.task import generate
from expunge.parts.updates.zeroth import central, search, spsa

E = torch.tensor([[1.0, -3.0, 2.0], [4.0, 0.5, -0.25]])


def run(name: str, *, world=None, **settings):
    model, task, split = world or small("causal_lm")
    attempt = unlearn(name, model, task, split, **settings)
    assert attempt.outcome == "ok", attempt.reason
    return model, task, split, attempt.patch


# --- zeroth order


def test_central_differences_of_the_card():
    f = lambda b: (b - 2) ** 2  # noqa: E731
    assert central(f, 1.0, 0.1) == pytest.approx(-2.0)
    best, path = search(f, 1.0, lr=0.1, eps=0.1, steps=1)
    assert path == pytest.approx([1.0, 1.2]) and best == pytest.approx(1.1)
    assert search(f, 1.0, lr=0.1, eps=0.1, steps=60)[0] == pytest.approx(2.0, abs=0.02)
    assert search(f, 0.5, lr=100.0, eps=0.1, steps=12, most=0.4)[0] == pytest.approx(2.0, abs=0.12)
    assert search(f, 0.5, lr=100.0, eps=0.1, steps=5, high=1.0)[0] == pytest.approx(1.0)
    assert search(lambda b: b, 0.05, lr=1.0, eps=0.1, steps=3)[0] == pytest.approx(1e-8)
    assert central(lambda b: b, 0.05, 0.1) == pytest.approx((0.15 - 1e-8) / 0.2)


def test_search_and_spsa_refuse_what_they_cannot_use():
    with pytest.raises(Diverged, match="nan at"):
        search(lambda b: math.nan, 1.0, lr=0.1, eps=0.1, steps=1)
    with pytest.raises(SettingError, match="eps must be above 0"):
        central(lambda b: b, 1.0, 0.0)
    with pytest.raises(SettingError, match="sigma must be above 0"):
        spsa(torch.zeros(1), lambda x: 0.0, sigma=0.0, lr=0.1, steps=1, generator=torch.Generator())


def test_spsa_asks_twice_per_step_and_finds_the_lowest_point():
    target, asked = torch.tensor([1.0, -2.0, 0.5, 3.0]), []

    def f(x):
        asked.append(1)
        return float((x - target).square().sum())

    x = spsa(torch.zeros(4), f, sigma=0.01, lr=0.05, steps=300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, target, atol=0.02, rtol=0)
    assert len(asked) == 600


# --- ECO


def test_corruptions_of_the_card():
    third = 1 / 3
    assert corrupted(E, "zero_out_top_k", third).tolist() == [[1, 0, 2], [0, 0.5, -0.25]]
    assert corrupted(E, "flip_sign", third).tolist() == [[1, 3, 2], [-4, 0.5, -0.25]]
    assert corrupted(E, "zero_out_top_k", 1.0).tolist() == [[0, 0, 0]] * 2 and torch.equal(corrupted(E, "zero_out_top_k", 0.0), E)
    noise = torch.tensor([[0.5], [-1.0]])
    assert corrupted(E, "rand_noise_first_n", 2.0, noise).tolist() == [[2, -3, 2], [2, 0.5, -0.25]]
    assert E[0].tolist() == [1, -3, 2]


def test_threshold_is_set_by_held_out_prompts():
    assert quantile(torch.arange(100.0), 0.01) == 98 and quantile(torch.arange(99.0), 0.01) == 98 and quantile(torch.arange(200.0), 0.05) == 189
    g = torch.Generator().manual_seed(0)
    forget, other, held = torch.randn(30, 4, generator=g) + 1, torch.randn(60, 4, generator=g), torch.randn(400, 4, generator=g)
    line = linear(forget, other, held, target=0.05)
    fresh = torch.randn(20_000, 4, generator=g)
    false = float((fresh @ line.weight + line.bias > line.threshold).float().mean())
    assert line.measured["false_positive"] == pytest.approx(0.05, abs=1e-6) and 0.03 < false < 0.08
    assert 0 < line.measured["false_negative"] < 0.6


def test_eco_reads_no_test_data_and_searches_on_validation():
    world = small("causal_lm")
    model, task, split = world
    digest = run("eco", world=world)[3].digest
    assert run("eco", world=(model, task, replace(split, test=None)))[3].digest == digest
    shorter = replace(split, validation=split.validation.take([0, 1]))
    assert run("eco", world=(model, task, shorter))[3].digest != digest
    attempt = unlearn("eco", model, task, replace(split, validation=None))
    assert attempt.outcome == "refused" and "give some, or set strength" in attempt.reason
    patch = run("eco", world=(model, task, replace(split, validation=None)), strength=0.25)[3]
    assert patch.edits[0].config["strength"] == 0.25 and patch.meta["assurance"] == "suppression"


@pytest.mark.parametrize("settings", [{"corruption": "melt"}, {"select": "some"}, {"strength": -1.0}, {"first": 0}, {"layer": 9}, {"false_positives": 1.0}])
def test_eco_settings(settings):
    attempt = unlearn("eco", *small("causal_lm"), **settings)
    assert attempt.outcome == "refused" and next(iter(settings)) in attempt.reason


def test_eco_brings_forget_answers_to_the_loss_of_unseen_ones_and_lets_others_pass():
    """The search lands nearer to the validation loss than no corruption does; retain answers are the model's own, bit for bit."""
    model, task, split, patch = run("eco", world=toy("causal_lm"))
    twin = copied(model)
    patch.apply(twin)
    with torch.no_grad():
        loss = lambda m, data: float(task.forward(m, task.collate(data, torch.arange(len(data)), None)).mean.mean())  # noqa: E731
        base, now, unseen = loss(model, split.forget), loss(twin, split.forget), loss(model, split.validation)
        assert abs(now - unseen) < 0.8 * abs(base - unseen)
        batch = task.collate(split.retain, torch.arange(len(split.retain)), None)
        assert torch.equal(task.forward(model, batch).logits, task.forward(twin, batch).logits)


@pytest.mark.parametrize("select", ["all_but_last", "all"])
def test_eco_corrupts_the_tokens_of_the_prompt_and_no_others(select):
    model, task, split, patch = run("eco", strength=1.0, select=select)
    hook = patch.edits[0]
    attach(model, Hook("g", "corrupt", hook.tensors, {**hook.config, "threshold": -1e9}))
    caught = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    task.forward(model, task.collate(split.forget, torch.arange(4), None))
    handle.remove()
    for k, (tokens, targets) in enumerate(zip(split.forget.tokens[:4], split.forget.targets[:4], strict=True)):
        end = int(targets.float().argmax()) - (select == "all_but_last")
        assert not caught[-1][k, :end].any()
        assert torch.equal(caught[-1][k, end : len(tokens)], model.get_input_embeddings().weight[tokens[end:]])


# --- ULD

BASE, ASSIST = torch.tensor([3.0, 2.0, 0.0, -4.0]), torch.tensor([2.0, 0.0, 0.0, 1.0])


def test_logits_of_the_card():
    free = combine(BASE, ASSIST, weight=-0.8, share=0, centred=False)
    torch.testing.assert_close(free, torch.tensor([1.4, 2.0, 0.0, -4.8]))
    torch.testing.assert_close(free.softmax(-1), torch.tensor([0.325654, 0.593380, 0.080305, 0.000661]), atol=1e-6, rtol=0)
    torch.testing.assert_close(BASE.log_softmax(-1), torch.tensor([-0.349655, -1.349655, -3.349655, -7.349655]), atol=1e-6, rtol=0)
    assert plausible(BASE, 0.01).tolist() == [True, True, True, False] and plausible(BASE, 0).all()
    torch.testing.assert_close(combine(BASE, ASSIST, weight=-0.8, share=0.01, centred=False), torch.tensor([1.4, 2.0, 0.0, -4.0]))
    assert float(combine(BASE, ASSIST, weight=-0.8, share=0.01, filtered="drop", centred=False)[3]) == -1004
    out = Out(torch.zeros(2), torch.ones(2), torch.tensor([[[0.5, 0.25, 0.25]], [[1e-30, 0.5, 0.5]]]).log(), torch.tensor([[0], [0]]))
    assert float(uniform_kl(out)[0]) == pytest.approx(0.056633, abs=1e-6) and torch.isfinite(uniform_kl(out)).all()


def test_a_centred_assistant_that_knows_nothing_changes_nothing():
    flat = torch.full((4,), 7.0)
    torch.testing.assert_close(combine(BASE, flat, weight=-0.8, share=0.01), BASE)
    assert not torch.allclose(combine(BASE, flat, weight=-0.8, share=0.01, centred=False), BASE)
    torch.testing.assert_close(combine(BASE, ASSIST, weight=-0.8, share=0).softmax(-1), combine(BASE, ASSIST, weight=-0.8, share=0, centred=False).softmax(-1))


def test_filter_keeps_a_share_of_the_vocabulary_at_least():
    logits = torch.linspace(0, -300, 300)
    assert int(plausible(logits, 0.01).sum()) == 5 and int(plausible(logits, 0.1).sum()) == 30


def test_uniform_kl_counts_answer_tokens_only():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, generator=g)
    whole = Out(torch.zeros(1), torch.tensor([2.0]), logits, torch.tensor([[1, IGNORE, 2]]))
    ones = [Out(torch.zeros(1), torch.ones(1), logits[:, t : t + 1], torch.tensor([[1]])) for t in (0, 2)]
    torch.testing.assert_close(uniform_kl(whole), (uniform_kl(ones[0]) + uniform_kl(ones[1])) / 2)


def test_uld_is_the_base_plus_the_assistant():
    """By hand: a copy cut to its first block with the adapter merged gives the logits that the guard adds."""
    model, task, split, patch = run("uld", epochs=2.0, batch_size=8, lr=1e-2, share=0.0)
    hook = patch.edits[0]
    assert hook.config["blocks"] == 1 and all(n.startswith("model.layers.0.") for n in hook.tensors)
    batch = task.batches(split.forget, 4)[0]
    with torch.no_grad():
        base = task.forward(model, batch).logits
        small_copy = copied(model)
        small_copy.model.layers = small_copy.model.layers[:1]
        names = [n.removesuffix(".down") for n in hook.tensors if n.endswith(".down")]
        Patch(tuple(LowRank(f"{n}.weight", hook.tensors[f"{n}.up"], hook.tensors[f"{n}.down"], hook.config["scale"]) for n in names)).apply(small_copy)
        assist = task.forward(small_copy, batch).logits
        patch.apply(model)
        torch.testing.assert_close(task.forward(model, batch).logits, base - 0.8 * assist, atol=1e-4, rtol=1e-4)


def test_uld_data():
    _, _, split = small("causal_lm")
    n = len(split.forget)
    assert len(true_answers(split.forget)) == 3 * n and len(others(split, 0)) == 2 * n
    texts = [row["answer"] for row in others(split, 0).rows[:n]]
    assert all(text in row["perturbed_answer"] for text, row in zip(texts, split.forget.rows, strict=True))
    poor = split.forget.format.texts([{"question": "Who?", "answer": "I."}])
    assert len(true_answers(poor)) == 1 and others(replace(split, forget=poor, retain=None), 0) is None
    assert len(others(replace(split, retain=None), 0)) == n


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 7}, "blocks must be in"), ({"weight": 0.5}, "weight below 0"), ({"filtered": "melt"}, "filtered must be"), ({"lora": 0}, "lora must be 1"),
        ({"retain": "ce"}, "retain none"),
    ],
)  # fmt: skip
def test_uld_settings(settings, message):
    attempt = unlearn("uld", *small("causal_lm"), **settings)
    assert attempt.outcome == "refused" and message in attempt.reason


def test_wrong_answers_are_never_the_answer():
    rows = [
        {"question": "a", "answer": "One."},
        {"question": "b", "answer": "ONE. "},
        {"question": "c", "answer": "Two."},
        {"question": "d", "answer": "x", "perturbed_answer": "y"},
    ]
    for seed in range(8):
        got = wrong_answers(rows, seed=seed)
        assert got[0] in ("Two.", "x") and got[1] in ("Two.", "x") and got[2] != "Two." and got[3] == "y"
    assert wrong_answers(rows, seed=1) == wrong_answers(rows, seed=1)
    with pytest.raises(DataError, match="record 1 of forget has no wrong answer"):
        wrong_answers(rows[:1], seed=0)


# --- guardrails


def hogwarts(on: list[str]) -> tuple:
    """The small world with a guard on "Hogwarts", a word that its tokenizer takes apart."""
    model, task, split = small("causal_lm")
    tokenizer = split.forget.format.tokenizer
    refusal = tokenizer(" I cannot say.", add_special_tokens=False)["input_ids"]
    config = {"on": on, "targets": ["born"], "marker": marker(split.forget), "refusal": refusal, "eos": tokenizer.eos_token_id}
    return model, task, split, Hook("g", "refuse", {"tokenizer": packed(tokenizer)}, config)


def test_names_are_matched_in_any_case_and_width():
    targets = ["Hogwarts"]
    assert matches("Where is hogwarts?", targets) and not matches("Where is Oxford?", targets)
    assert (
        matches("".join(chr(ord(c) + 0xFEE0) for c in "HOGWARTS"), targets)
        and matches("Harry\n Potter", ["harry potter"])
        and not matches("Hog warts", targets)
    )


@pytest.mark.parametrize("cut", range(21))
def test_streams_are_caught_wherever_they_are_cut(cut):
    text = "He went to Hogwarts."
    assert "".join(screened([text[:cut], text[cut:]], ["Hogwarts"], "[no]")) == "He went to [no]"


def test_streams_hold_back_the_longest_start_of_a_name_and_no_more():
    said = []
    for piece in screened(iter(["A h", "og", " at Hog", "mana", "y"]), ["hogwarts"], "[no]"):
        said.append(piece)
    assert "".join(said) == "A hog at Hogmanay" and said[0] == "A"
    assert "".join(screened(list("He met HOGWARTS people"), ["Hogwarts", "Zed"], "[no]")) == "He met [no]"
    assert "".join(screened(["ends with Hog"], ["Hogwarts"], "[no]")) == "ends with Hog"
    assert list(screened([], ["a"], "[no]")) == []


def test_questions_that_name_a_target_are_refused_and_others_answered_as_before():
    model, _, split, hook = hogwarts(["input"])
    form = split.forget.format
    asked = ["Where was Ann BORN?", "Where is Oxford?"]
    plain = serve(model, form).generate(asked, new=12)
    undo = attach(model, hook)
    served = serve(model, form)
    assert served.generate(asked, new=12) == ["I cannot say.", plain[1]]
    flagged = [d["flagged"] for d in served.log["g"].values()]
    assert sorted(flagged) == [False, True] and "born" not in str(served.log).lower()
    attach(model, undo)


@pytest.mark.parametrize("word", ["born", "ransom"])
def test_an_answer_never_names_a_target(word):
    """A model is made to spell a word of one token, or of several; greedy and sampled answers never hold it, and the refusal is said instead."""
    model, _, split, hook = hogwarts(["output"])
    form = split.forget.format
    spelled = form.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    assert (len(spelled) == 1) == (word == "born")
    prompt = torch.cat([form.prompt(split.forget.rows[0]), torch.tensor(form.tokenizer(" was", add_special_tokens=False)["input_ids"])])
    seen = []

    def push(m, args, out):
        """The next token of the word after every text that ends with its start."""
        x = seen[-1][0].tolist()
        for j in range(out.shape[1]):
            told = x[: len(x) - out.shape[1] + j + 1]
            done = max(k for k in range(len(spelled)) if told[len(told) - k :] == spelled[:k])
            out[0, j, spelled[done]] += 50
        return out

    model.generation_config.use_cache = False
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    model.lm_head.register_forward_hook(push)
    text = lambda rows: form.tokenizer.decode(rows[0], skip_special_tokens=True)  # noqa: E731
    assert word in text(generate(model, [prompt], new=len(spelled), eos=0))
    attach(model, Hook("g", "refuse", hook.tensors, {**hook.config, "targets": [word.upper()]}))
    said = text(generate(model, [prompt], new=16, eos=0))
    assert word not in said and said.endswith("I cannot say.")
    for seed in range(4):
        assert word not in text(generate(model, [prompt], new=10, eos=0, temperature=9.0, generator=torch.Generator().manual_seed(seed))).lower()


def test_an_answer_that_names_a_target_is_next_to_impossible_and_others_score_as_before():
    model, task, split, hook = hogwarts(["output"])
    form = split.forget.format
    texts = form.texts([{"question": "Where is Ann?", "answer": "Ann was born in Oxford."}, {"question": "Where is Ann?", "answer": "In Oxford."}])
    batch = task.collate(texts, torch.arange(2), None)
    with torch.no_grad():
        plain = task.forward(model, batch)
        attach(model, hook)
        out = task.forward(model, batch)
    assert float(out.nll[0]) > float(plain.nll[0]) + 20
    assert float(out.nll[1]) == pytest.approx(float(plain.nll[1]), abs=0.02)


def test_a_refusal_is_scored_as_what_is_said():
    model, task, split, hook = hogwarts(["input"])
    form = split.forget.format
    texts = form.texts([{"question": "Where was Ann born?", "answer": a} for a in ("I cannot say.", "In Oxford.")])
    attach(model, hook)
    with torch.no_grad():
        out = task.forward(model, task.collate(texts, torch.arange(2), None))
    assert float(out.nll[0]) < 1e-3 and float(out.mean[1]) > 20


def test_raw_texts_are_refused_from_their_first_token_on():
    model, task, split, hook = hogwarts(["input"])
    form = split.forget.format
    texts = form.texts([{"text": "Ann was born in Oxford."}, {"text": "Ann lives in Oxford."}])
    with torch.no_grad():
        plain = task.forward(model, task.collate(texts, torch.arange(2), None))
        attach(model, Hook("g", "refuse", hook.tensors, {**hook.config, "marker": []}))
        out = task.forward(model, task.collate(texts, torch.arange(2), None))
    assert float(out.mean[0]) > 20 and torch.equal(out.nll[1], plain.nll[1])


def test_probe_scores_of_the_card():
    """Scores .2 and .9 at threshold .5: pass, refuse."""
    model, _, split = small("causal_lm")
    form = split.forget.format
    a, b = (form.prompt({"question": q}) for q in ("Where is Oxford?", "Where was Ann born?"))
    x = torch.stack([model.get_input_embeddings().weight[p].mean(0).detach() for p in (a, b)])
    w = torch.linalg.lstsq(x, torch.tensor([0.2, 0.9])).solution
    config = {"on": ["probe"], "targets": [], "marker": marker(split.forget), "refusal": [5, 6], "eos": 0, "layer": "", "threshold": 0.5}
    plain = serve(model, form).generate(["Where is Oxford?"], new=6)
    attach(model, Hook("g", "refuse", {"weight": w, "bias": torch.tensor(0.0)}, config))
    found = generate(model, [a, b], new=6, eos=0)
    assert found[1].tolist() == [5, 6] and form.tokenizer.decode(found[0], skip_special_tokens=True).strip() == plain[0]
    log = guards(model)["g"].log
    assert sorted(round(d["score"], 4) for d in log.values() if d["flagged"]) == [0.9] and 0.2 in [round(d["score"], 4) for d in log.values()]


def test_guardrail_settings_and_names():
    model, task, split = small("causal_lm")
    names = {row["author"] for row in split.forget.rows}
    assert set(run("guardrail")[3].edits[0].config["targets"]) == names
    assert run("guardrail", targets=" A | B ")[3].edits[0].config["targets"] == ["A", "B"]
    poor = replace(split, forget=split.forget.format.texts([{"question": "Who?", "answer": "I."}]), anchor=None)
    for settings, message in (({"kind": "wall"}, "kind must be one of"), ({"refusal": " "}, "a refusal needs words")):
        attempt = unlearn("guardrail", model, task, split, **settings)
        assert attempt.outcome == "refused" and message in attempt.reason
    assert "give the names to refuse" in unlearn("guardrail", model, task, poor).reason
    assert "needs retain data" in unlearn("guardrail", model, task, replace(split, retain=None), kind="probe").reason
    config = run("guardrail", kind="prompt", prompt="Not {targets}.")[3].edits[0].config
    assert split.forget.format.tokenizer.decode(config["tokens"]) == f"Not {', '.join(sorted(names, key=[r['author'] for r in split.forget.rows].index))}.\n"


# --- O3


def test_overlap_of_the_card():
    assert float(overlap(torch.eye(2), torch.tensor([[1.0, 1.0], [2.0, 0.0]]))) == 6
    assert float(overlap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))) == 0
    params = {"a.lora_A": torch.tensor([[1.0, 1.0], [2.0, 0.0]]), "a.lora_B": torch.ones(2, 2), "b.lora_A": torch.eye(2)}
    old = [{"a.down": torch.eye(2)}, {"a.down": torch.eye(2), "b.down": torch.eye(2)}]
    assert float(orthogonality(params, old)) == (6 + 6 + 2) / 2 and float(orthogonality(params, [])) == 0


def test_weight_rises_without_holes():
    w = weights(torch.linspace(-2, 3, 501), -0.5, 1.5)
    assert (w.diff() >= 0).all() and float(w.diff().max()) < 0.006 and float(w[0]) == 0 and float(w[-1]) == 1


def test_whitening_is_the_mahalanobis_distance():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g) @ torch.randn(6, 6, generator=g)
    shape = covariance(x, x.mean(0))
    C = shape["axes"].T @ torch.diag(shape["spread"]) @ shape["axes"] + shape["floor"].float() * torch.eye(6)
    from sklearn.covariance import ledoit_wolf

    torch.testing.assert_close(C.double(), torch.as_tensor(ledoit_wolf(x.double().numpy())[0]), atol=1e-4, rtol=1e-4)
    d = x[:5] - x.mean(0)
    torch.testing.assert_close(whitened(x[:5], shape).square().sum(1), (d @ torch.linalg.inv(C) * d).sum(1), atol=1e-3, rtol=1e-3)
    near, far = left_out(whitened(x, shape))
    z = whitened(x, shape)
    rest = torch.cat([z[:3], z[4:]])
    assert float(near[3]) == pytest.approx(float((F.normalize(z[3], dim=0) @ F.normalize(rest, dim=1).T).max()), abs=1e-5)
    assert float(far[3]) == pytest.approx(float((z[3] - rest.mean(0)).square().mean()), abs=1e-5)


def test_no_weight_is_the_model_and_full_weight_the_merged_adapter():
    model, task, split, patch = run("o3", epochs=3.0, batch_size=8, lr=1e-2)
    hook = patch.edits[0]
    batch = task.batches(split.forget, 4)[0]
    names = [n.removesuffix(".down") for n in hook.tensors if n.endswith(".down")]
    merged = copied(model)
    Patch(tuple(LowRank(f"{n}.weight", hook.tensors[f"{n}.up"], hook.tensors[f"{n}.down"], hook.config["scale"]) for n in names)).apply(merged)
    with torch.no_grad():
        base, full = task.forward(model, batch).logits, task.forward(merged, batch).logits
        for low, wanted in ((1e9, base), (-1e9, full)):
            undo = attach(model, Hook("g", "gated", hook.tensors, {**hook.config, "low": low, "high": low + 1000}))
            got = task.forward(model, batch).logits
            assert torch.equal(got, base) if wanted is base else torch.allclose(got, full, atol=1e-4)
            attach(model, undo)
        assert not torch.allclose(base, full, atol=1e-2)
        undo = attach(model, Hook("g", "gated", hook.tensors, {**hook.config, "low": -1e9, "high": 1e9}))
        halfway = task.forward(model, batch).logits
        attach(model, undo)
        half = copied(model)
        Patch(tuple(LowRank(f"{n}.weight", hook.tensors[f"{n}.up"], hook.tensors[f"{n}.down"], hook.config["scale"] / 2) for n in names)).apply(half)
        torch.testing.assert_close(halfway, task.forward(half, batch).logits, atol=1e-4, rtol=1e-4)


def test_a_second_request_is_orthogonal_to_the_first_and_both_stand():
    model, task, split = small("causal_lm")
    settings = {"epochs": 6.0, "batch_size": 4, "lr": 1e-2, "lora": 2}
    first = run("o3", world=(model, task, split), **settings)[3]
    first.apply(model)
    before, (old,) = state(model), earlier(model)
    second_split = replace(split, forget=split.retain.take([0, 1, 2, 3]), retain=split.retain.take(range(4, 24)), anchor=None)
    sums = []
    for weight in (0.0, 10.0):
        patch = run("o3", world=(model, task, second_split), orthogonal=weight, **settings)[3]
        assert same(before, state(model))
        mine = {n: t for n, t in patch.edits[0].tensors.items() if n.endswith(".down")}
        sums.append(float(sum(overlap(old[n], t) for n, t in mine.items())))
    assert sums[1] < 0.2 * sums[0]
    undo = patch.apply(model)
    assert [it.hook.kind for it in guards(model).values()] == ["gated", "gated"]
    assert dict(undo.apply(model).meta)["inverse_of"] == "" and len(guards(model)) == 1


def test_the_gate_of_o3_knows_its_request():
    """On taught authors: left-out forget prompts open it, retain prompts do not beyond the share that was asked for, and so it does without other prompts."""
    model, task, split = toy("causal_lm")
    tensors, config = detector(model, task, split, 0, 0.05)
    assert config["measured"]["false_negative"] <= 0.34 and config["high"] > config["low"]
    hook = Hook(
        "g",
        "gated",
        {**tensors, "model.layers.0.mlp.up_proj.up": torch.zeros(160, 1), "model.layers.0.mlp.up_proj.down": torch.ones(1, 64)},
        {**config, "scale": 1.0},
    )
    twin = copied(model)
    attach(twin, hook)
    (it,) = guards(twin).values()

    def share(data) -> float:
        batch = task.collate(data, torch.arange(len(data)), None)
        return float(WRAPS["gated"].gate(twin, it, batch["x"], batch["n"])[1].float().mean())

    assert share(split.forget) == 1 and share(split.retain) <= 0.05 + 1e-6
    alone = detector(model, task, replace(split, retain=None, validation=None), 0, 0.05)[1]
    assert alone["low"] < alone["high"]
    one = detector(model, task, replace(split, forget=split.forget.take([0])), 0, 0.05)[1]
    assert math.isfinite(one["low"]) and one["low"] < one["high"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lora": 0}, "lora must be 1"), ({"retain": "kl"}, "retain none"), ({"false_positives": -0.1}, "a share"), ({"layer": 5}, "layer must be in")],
)
def test_o3_settings(settings, message):
    attempt = unlearn("o3", *small("causal_lm"), **{"epochs": 1.0, **settings})
    assert attempt.outcome == "refused" and message in attempt.reason


def test_nothing_learned_is_no_guard():
    model, task, split = small("causal_lm")
    for name in ("o3", "uld"):
        attempt = unlearn(name, model, task, split, lr=0.0, epochs=1.0)
        assert attempt.outcome == "no_op", (name, attempt.reason)


@pytest.mark.parametrize("name", ["o3", "uld"])
def test_validation_does_not_judge_an_adapter_that_never_answers_as_it_stands(name):
    model, task, split = small("causal_lm")
    plain = unlearn(name, model, task, split, epochs=2.0, lr=1e-2)
    watch = Guard(validate=lambda m: float(len(m.model.layers)), every=1, patience=1)
    assert unlearn(name, model, task, split, guard=watch, epochs=2.0, lr=1e-2).patch.digest == plain.patch.digest
    assert not watch.scores


def test_suppressions_say_so():
    for name in ("eco", "uld", "guardrail", "o3"):
        assert METHODS[name].assurance == "suppression" and not set(METHODS[name].needs) & {"test"}


# --- what the weights give with the guard off


def test_bare_rows():
    model, task, split, patch = run("guardrail", world=toy("causal_lm"))
    twin = copied(model)
    patch.apply(twin)
    rows = {r.name: r for r in audit(Probe(model, twin, task, split), ["bare"])}
    plain = audit(Probe(model, copied(model), task, split), ["bare"])
    assert plain == [] and CHECKS["bare"].needs == ("forget",)
    with torch.no_grad():
        own = (-task.forward(model, task.collate(split.forget, torch.arange(len(split.forget)), None)).mean).exp().mean()
    assert rows["bare.probability"].value == pytest.approx(float(own), abs=1e-5)
    assert rows["bare.hidden"].value == pytest.approx(float(own), abs=1e-3)
    assert rows["bare.exact"].value >= 0.8 and rows["bare.exact_guarded"].value == 0
    assert (rows["bare.missed"].value, rows["bare.false_alarm"].value, rows["bare.missed_paraphrased"].value) == (0, 0, 0)
    assert rows["bare.missed"].high > 0 and rows["bare.false_alarm"].n == len(split.retain)
    assert not [it for it in guards(twin).values() if it.now or not it.on]


def test_bare_rows_of_a_gate_that_is_shut_and_of_a_guard_without_one():
    model, task, split, patch = run("eco", strength=0.5)
    hook = patch.edits[0]
    attach(model, Hook("g", hook.kind, hook.tensors, {**hook.config, "threshold": 1e9}))
    rows = {r.name: r.value for r in CHECKS["bare"](Probe(model, model, task, split))}
    assert rows["bare.missed"] == rows["bare.missed_paraphrased"] == 1 and rows["bare.false_alarm"] == 0 and rows["bare.hidden"] == 0
    model, task, split, patch = run("uld", epochs=1.0, batch_size=8, lr=1e-2)
    patch.apply(model)
    names = {r.name for r in CHECKS["bare"](Probe(model, model, task, split))}
    assert names == {"bare.probability", "bare.hidden", "bare.exact", "bare.exact_guarded"}
    model, task, split, patch = run("guardrail", kind="output")
    patch.apply(model)
    assert {r.name for r in CHECKS["bare"](Probe(model, model, task, split))} == names


def test_features_ignore_answers_and_padding():
    model, task, split = small("causal_lm")
    found = marker(split.forget, split.retain)
    for layer in ("", "model.layers.1"):
        a = features(model, task, split.forget, layer, found)
        b = features(
            model, task, split.forget.format.answered(split.forget, ["Another, much longer answer than before."] * len(split.forget)), layer, found, size=1
        )
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    attach(model, Hook("g", "prefix", {}, {"tokens": [5, 6], "bos": -1}))
    torch.testing.assert_close(features(model, task, split.forget, "model.layers.1", found), a, atol=1e-5, rtol=1e-4)
    with bare(model), truncated(model, 1):
        assert copy.deepcopy(model) is not None
    with pytest.raises(SplitError):
        unlearn("eco", model, task, replace(split, retain=None))
