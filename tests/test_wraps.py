"""Guards: attached, saved, copied and taken off like any patch; exact under either padding, at every step, and for every row of a batch."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn
from worlds import copied, same, small, state

from expunge.core.edits import MAX_CONFIG, Hook, Replace
from expunge.core.errors import DataError, ModelError, PatchError
from expunge.core.hooks import NONE, WRAPS, attach, bare, guards, wrap
from expunge.core.patch import Patch
from expunge.core.registry import METHODS
from expunge.modalities.language.guards.gate import ends, flush, marker
from expunge.modalities.language.guards.offset import truncated
from expunge.modalities.language.guards.prefix import put
from expunge.modalities.language.guards.serve import serve
from expunge.modalities.language.task import generate, hidden, padded

CASES = {
    "corrupt": ("eco", {"strength": 0.5}), "noise": ("eco", {"strength": 9.0, "corruption": "rand_noise_first_n", "first": 8}),
    "offset": ("uld", {"epochs": 2.0, "batch_size": 8, "lr": 3e-2}), "input": ("guardrail", {}), 
    "output": ("guardrail", {"kind": "both", "targets": "born|Zz"}),
    "prefix": ("guardrail", {"kind": "prompt"}), "probe": ("guardrail", {"kind": "probe"}), "gated": ("o3", {"epochs": 2.0, "batch_size": 8, "lr": 3e-2}),
}  # fmt: skip


@functools.cache
def patch(case: str) -> Patch:
    """A guard of every kind, made by its method on the small world."""
    model, task, split = small("causal_lm")
    name, settings = CASES[case]
    return METHODS[name](model, task, split, **settings)


def guarded(case: str):
    model, task, split = small("causal_lm")
    patch(case).apply(model)
    return model, task, split


def left(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows padded on the left, with the places that generation gives them."""
    width = max(len(r) for r in rows)
    x = torch.stack([nn.functional.pad(r, (width - len(r), 0), value=5) for r in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(r), (width - len(r), 0)) for r in rows])
    return {"input_ids": x, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def right(rows: list[torch.Tensor], fill: int = 0) -> dict[str, torch.Tensor]:
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return {"input_ids": x, "attention_mask": (torch.arange(x.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]).long()}


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_every_kind_has_a_case():
    assert {p.edits[0].kind for p in map(patch, CASES)} | {"permeable"} == set(WRAPS)  # permeable guards pictures: tests/test_methods_spm.py


@pytest.mark.parametrize("case", list(CASES))
def test_attached_and_taken_off(case, tmp_path):
    """The guard changes something, the weights stay, the inverse leaves no hook; twice, after an inverse, from disk, by force."""
    model, task, split = small("causal_lm")
    before, bare_hooks, cache = state(model), hooks(model), model.generation_config.use_cache
    batch = task.batches(split.forget, 4)[0]
    plain = task.forward(model, batch).logits
    inverse = patch(case).apply(model)
    assert hooks(model) != bare_hooks and model.generation_config.use_cache is False
    assert all(torch.equal(t, before["tensors"][n]) for n, t in state(model)["tensors"].items())
    assert not torch.equal(task.forward(model, batch).logits, plain)
    with bare(model):
        assert torch.equal(task.forward(model, batch).logits, plain)
    with pytest.raises(PatchError, match="applied already"):
        patch(case).apply(model)
    with pytest.raises(PatchError, match="attached already"):
        patch(case).apply(model, force=True)
    again = inverse.apply(model)
    assert hooks(model) == bare_hooks and same(before, state(model)) and model.generation_config.use_cache == cache and not guards(model)
    assert torch.equal(task.forward(model, batch).logits, plain)
    with pytest.raises(PatchError, match="no guard called"):
        inverse.apply(model)
    loaded = Patch.load(patch(case).save(tmp_path / "p", b"key"), b"key")
    assert loaded.digest == patch(case).digest and loaded.places == patch(case).places == sum(t.numel() for t in loaded.edits[0].tensors.values())
    twin = copied(model)
    loaded.apply(twin)
    again.apply(model)
    assert torch.equal(task.forward(twin, batch).logits, task.forward(model, batch).logits)


@pytest.mark.parametrize("case", list(CASES))
def test_exact_under_padding_and_batches(case):
    """Left padding, right padding, what padding holds, and a batch of one give the same logits at every token."""
    model, _, split = guarded(case)
    rows = [*split.forget.tokens[:3], *split.retain.tokens[:2], split.forget.format.prompt(split.forget.rows[0])]
    with torch.no_grad():
        a, other, b = model(**right(rows)).logits, model(**right(rows, 7)).logits, model(**left(rows)).logits
        for k, row in enumerate(rows):
            n = len(row)
            one = model(input_ids=row[None]).logits[0]
            assert torch.equal(a[k, :n], other[k, :n])
            torch.testing.assert_close(a[k, :n], one, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(b[k, -n:], one, atol=2e-4, rtol=1e-4)
            last = model(input_ids=row[None], logits_to_keep=3).logits[0]
            torch.testing.assert_close(last, one[-3:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", list(CASES))
def test_generation_is_the_whole_forward_at_every_step(case):
    model, _, split = guarded(case)
    prompts = [split.forget.format.prompt(r) for r in (*split.forget.rows[:2], *split.retain.rows[:2])]
    found = generate(model, prompts, new=6, eos=0)
    for prompt, said in zip(prompts, found, strict=True):
        text = prompt
        for token in [*said.tolist(), 0][:6]:
            with torch.no_grad():
                logits = model(input_ids=text[None]).logits[0, -1]
            best = logits.topk(2)
            assert token == int(best.indices[0]) or float(best.values[0] - logits[token]) < 1e-4
            text = torch.cat([text, torch.tensor([token])])


@pytest.mark.parametrize("case", list(CASES))
def test_scored_answers_do_not_depend_on_the_batch(case):
    """`task.forward` on a guarded model: padding never counts, and a row alone scores as in company."""
    model, task, split = guarded(case)
    batch = task.collate(split.forget, torch.arange(4), None)
    with torch.no_grad():
        whole = task.forward(model, batch)
        torch.testing.assert_close(task.forward(model, padded(batch, 3, token=9)).nll, whole.nll, atol=1e-3, rtol=1e-4)
        for k in range(4):
            one = task.forward(model, task.collate(split.forget, torch.tensor([k]), None))
            torch.testing.assert_close(one.nll[0], whole.nll[k], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("case", ["corrupt", "noise", "input", "output", "probe", "gated"])
def test_rows_that_are_not_flagged_pass_bit_for_bit(case):
    model, task, split = small("causal_lm")
    both = split.forget.format.texts([*split.forget.rows, *split.retain.rows[:6]])
    batch = task.collate(both, torch.arange(len(both)), None)
    if case == "output":
        batch = {n: v[4:] for n, v in batch.items()}
    with torch.no_grad():
        plain = task.forward(model, batch).logits
        attach(
            model,
            Hook("g", patch(case).edits[0].kind, patch(case).edits[0].tensors, {**patch(case).edits[0].config, "targets": [split.forget.rows[0]["author"]]}),
        )
        out = task.forward(model, batch).logits
    retain = torch.arange(len(plain)) >= len(plain) - 6
    assert torch.equal(out[retain], plain[retain])
    if case != "output":
        assert all(not torch.equal(out[k], plain[k]) for k in range(4))


@pytest.mark.parametrize("case", list(CASES))
def test_a_copy_is_guarded_and_independent(case):
    model, task, split = guarded(case)
    batch = task.batches(split.forget, 4)[0]
    twin = copied(model)
    with torch.no_grad():
        on = task.forward(model, batch).logits
        assert torch.equal(task.forward(twin, batch).logits, on)
        name = next(iter(guards(model)))
        guards(model)[name].log.clear()
        task.forward(twin, batch)
        assert not guards(model)[name].log and guards(twin)[name] is not guards(model)[name]
        attach(twin, Hook(name, NONE))
        assert torch.equal(task.forward(model, batch).logits, on) and not guards(twin)
        assert twin.generation_config.use_cache != model.generation_config.use_cache
        other = copied(model)
        other.get_input_embeddings().weight.mul_(0.5)
        moved = task.forward(other, batch).logits
        assert torch.equal(task.forward(model, batch).logits, on)
        if case in ("corrupt", "offset", "gated", "prefix"):
            assert not torch.equal(moved, on)


def test_guards_stack_and_come_off_in_any_order():
    model, task, split = small("causal_lm")
    bare_hooks, cache = hooks(model), model.generation_config.use_cache
    batch = task.batches(split.retain, 4)[0]
    plain = task.forward(model, batch).logits
    undo = [patch(case).apply(model) for case in CASES if case not in ("noise", "output")]
    assert len(guards(model)) == 6
    rows = list(split.forget.tokens[:3])
    with torch.no_grad():
        a, b = model(**right(rows)).logits, model(**left(rows)).logits
        for k, row in enumerate(rows):
            torch.testing.assert_close(b[k, -len(row) :], a[k, : len(row)], atol=5e-4, rtol=1e-3)
    for k in (1, 4, 0, 5, 3, 2):
        undo[k].apply(model)
    assert hooks(model) == bare_hooks and model.generation_config.use_cache == cache
    assert torch.equal(task.forward(model, batch).logits, plain)


def test_a_pass_that_ends_early_leaves_nothing_behind():
    """`hidden` stops a pass in the middle; the next one starts from nothing, and the gate of one guard never sees another at work."""
    model, task, split = guarded("corrupt")
    patch("gated").apply(model)
    batch = task.batches(split.forget, 4)[0]
    states = hidden(model, batch)
    assert all(not it.now and it.on for it in guards(model).values())
    with bare(model):
        assert not torch.equal(hidden(model, batch), states)
    with truncated(model, 1):
        assert len(model.model.layers) == 1
    with pytest.raises(ZeroDivisionError), truncated(model, 1):
        raise ZeroDivisionError
    assert len(model.model.layers) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"past_key_values": object()}, "give all of it at every step, without past_key_values"), ({"input_ids": None}, "give input_ids"),
        ({"attention_mask": torch.ones(1, 9)}, "give all of it at every step"), ({"labels": torch.tensor([[3, 4]])}, "take the loss of a task"),
    ],
)  # fmt: skip
def test_calls_that_a_guard_cannot_judge_are_refused(call, message):
    model, _, _ = guarded("input")
    with pytest.raises(ModelError, match=message):
        model(**{"input_ids": torch.tensor([[3, 4]]), **call})
    assert all(not it.now for it in guards(model).values())


def test_generation_that_asks_for_a_cache_is_refused():
    model, _, _ = guarded("corrupt")
    with pytest.raises(ModelError, match="use_cache=False"):
        model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=2, use_cache=True, pad_token_id=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hook("", "corrupt"), "needs a name and a kind"), (lambda: Hook("g", "corrupt", {"a": [1]}), "tensors must map names to tensors"),
        (lambda: Hook("g", "corrupt", {}, [1]), "config must map names"), (lambda: Hook("g", "corrupt", {}, {"a": math.nan}), "config is no JSON"),
        (lambda: Hook("g", "corrupt", {}, {"a": print}), "config is no JSON"),
        (lambda: Hook("g", "corrupt", {}, {"a": "x" * MAX_CONFIG}), "bytes long, more than"),
    ],
)  # fmt: skip
def test_hooks_that_are_none(make, message):
    with pytest.raises(PatchError, match=message):
        make()


def changed(case: str, drop: str = "", tensors: dict | None = None, **config) -> Hook:
    hook = patch(case).edits[0]
    kept = {n: t for n, t in {**hook.tensors, **(tensors or {})}.items() if n != drop}
    return Hook("g", hook.kind, kept, {n: v for n, v in {**hook.config, **config}.items() if n != drop})


BAD = [
    (lambda: Hook("g", "corupt"), "no kind 'corupt'; did you mean 'corrupt'"),
    (lambda: changed("corrupt", "threshold"), "needs threshold as float in its config, found None"),
    (lambda: changed("corrupt", threshold=True), "needs threshold as float in its config, found True"),
    (lambda: changed("corrupt", "weight"), "needs a tensor weight of 1 dimension"),
    (lambda: changed("corrupt", corruption="melt"), "corruption must be one of"),
    (lambda: changed("corrupt", layer="model.nowhere"), "no module 'model.nowhere'"), (lambda: changed("noise", "noise"), "needs a tensor noise"),
    (lambda: changed("offset", blocks=9), "blocks must be in 1..2"), (lambda: changed("offset", filtered="melt"), "filtered must be one of keep, drop"),
    (lambda: changed("gated", low=1.0, high=1.0), "high must lie above low"), (lambda: changed("gated", cosine=[1.0]), "pairs of numbers"),
    (lambda: changed("gated", tensors={"model.layers.0.mlp.down_proj.up": torch.zeros(3, 8)}), "this model has"),
    (lambda: changed("gated", tensors={"model.layers.7.mlp.down_proj.down": torch.zeros(8, 8)}), "adapts model.layers.7.mlp.down_proj, which this"),
    (lambda: changed("prefix", tokens=[1 << 20]), "tokens must be a list"), (lambda: changed("input", on=["ears"]), "on must hold some of"),
    (lambda: changed("input", targets=["  "]), "targets must be a list"),
    (lambda: changed("input", "tokenizer"), "needs its tokenizer as JSON in at most 67108864 bytes"),
    (lambda: changed("input", tensors={"tokenizer": torch.zeros(4, dtype=torch.uint8)}), "its tokenizer cannot be read"),
    (lambda: changed("input", refusal=[]), "the refusal is empty"), (lambda: changed("probe", "bias"), "a probe needs layer and threshold"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD)
def test_hooks_that_do_not_fit_leave_the_model_as_it_was(make, message):
    model, _, _ = small("causal_lm")
    before = hooks(model)
    with pytest.raises(PatchError, match=message):
        Patch((Replace("model.norm.weight", model.model.norm.weight.detach() * 2), make())).apply(model, force=True)
    assert hooks(model) == before and not guards(model) and torch.equal(model.model.norm.weight, torch.ones(32))


def test_another_model_is_refused_and_patches_combine():
    model = small("causal_lm")[0]
    a, b = patch("input"), patch("corrupt")
    other = copied(model)
    with torch.no_grad():
        other.lm_head.weight.view(-1)[3] += 1
    with pytest.raises(PatchError, match="applied already, or another model"):
        a.apply(other)
    with pytest.raises(PatchError, match="both patches edit the same places"):
        a | a
    with pytest.raises(PatchError, match="two guards called"):
        Patch((*a.edits, *a.edits)).apply(model)
    assert not guards(model)
    both = (a | b).stamped(model)
    undo = both.apply(model)
    assert list(guards(model)) == [a.edits[0].name, b.edits[0].name]
    undo.apply(model)
    assert not guards(model)
    weights = Patch((Replace("model.norm.weight", model.model.norm.weight.detach() * 2),))
    before = state(model)
    undo = (weights | a).stamped(model).apply(model)
    assert guards(model) and not same(before, state(model))
    undo.apply(model)
    assert same(before, state(model))


def test_tampered_guards_are_refused(tmp_path):
    path = patch("gated").save(tmp_path / "p")
    good = path.read_bytes()
    for k in range(0, len(good), max(1, len(good) // 60)):
        raw = bytearray(good)
        raw[k] ^= 1
        path.write_bytes(bytes(raw))
        with pytest.raises(PatchError):
            Patch.load(path)


def test_models_that_are_no_language_models_can_be_guarded_by_kinds_of_ones_own():
    """A kind registered elsewhere: hooks on any module, found by name, taken off without a trace."""

    @wrap(config={"by": float}, tensors={})
    def louder(model, it):
        return [model.register_forward_hook(lambda m, args, out: out * it.hook.config["by"] if it.on else None)]

    try:
        model = nn.Linear(2, 2)
        plain = model(torch.ones(1, 2))
        undo = Patch((Hook("loud", "louder", {}, {"by": 2.0}),)).stamped(model).apply(model)
        torch.testing.assert_close(model(torch.ones(1, 2)), 2 * plain)
        undo.apply(model)
        assert torch.equal(model(torch.ones(1, 2)), plain) and hooks(model) == [(0, 0)]
        with pytest.raises(PatchError, match="needs by as float"):
            attach(model, Hook("loud", "louder", {}, {"by": "2"}))
    finally:
        WRAPS._found.pop("louder")


def test_prompts_end_behind_the_last_marker():
    _, _, split = small("causal_lm")
    found = marker(split.forget, split.retain)
    form = split.forget.format
    assert form.tokenizer.decode(found) == "\nAnswer:"
    for tokens, targets, row in zip(split.forget.tokens, split.forget.targets, split.forget.rows, strict=True):
        prompt = form.prompt(row)
        x = torch.stack([nn.functional.pad(tokens, (0, 3)), nn.functional.pad(prompt, (0, len(tokens) + 3 - len(prompt)))])
        n = torch.tensor([len(tokens), len(prompt)])
        assert ends(x, n, found).tolist() == [int(targets.float().argmax()), len(prompt)]
    assert ends(torch.tensor([[1, 2, 1, 2]]), torch.tensor([3]), [1, 2]).tolist() == [2]
    assert ends(torch.tensor([[3, 4]]), torch.tensor([2]), [1, 2]).tolist() == [2]
    assert marker(form.texts([{"text": "no question here"}])) == []


def test_rows_are_moved_and_prefixed_whatever_side_is_padded():
    x, n, first = flush(torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert x[0, :2].tolist() == [5, 6] and x[1, :3].tolist() == [7, 8, 9] and n.tolist() == [2, 3] and first.tolist() == [2, 0]
    y, mask = put(torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]), [1, 2], bos=7)
    assert y.tolist() == [[0, 0, 1, 2, 5, 6], [7, 1, 2, 8, 9, 0]] and mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]


def test_a_prefix_is_what_the_model_says_after_those_tokens():
    model, _, split = small("causal_lm")
    hook = patch("prefix").edits[0]
    row = split.forget.tokens[0]
    with torch.no_grad():
        by_hand = model(input_ids=torch.cat([torch.tensor(hook.config["tokens"]), row])[None]).logits[0, -len(row) :]
        attach(model, hook)
        torch.testing.assert_close(model(input_ids=row[None]).logits[0], by_hand)


@pytest.mark.parametrize("case", [None, "input", "output", "gated"])
def test_served_models_answer_alike_guarded_or_bare(case):
    model, task, split = small("causal_lm")
    form = split.forget.format
    with serve(model, form, patch(case) if case else None) as s:
        questions = [r["question"] for r in split.forget.rows[:3]]
        answers = s.generate(questions, new=8)
        assert answers == task.sample(model, split.forget.take([0, 1, 2]), new=8)
        prompts = [form.prompt(r) for r in split.forget.rows[:3]]
        logits = s.logits(questions)
        for k, prompt in enumerate(prompts):
            with torch.no_grad():
                torch.testing.assert_close(logits[k, : len(prompt)], model(input_ids=prompt[None]).logits[0], atol=2e-4, rtol=1e-4)
        texts = s.logits(split.forget)
        assert torch.equal(texts, s.logits(task.collate(split.forget, torch.arange(len(split.forget)), None)))
        assert "".join(s.stream(questions[0], new=8, chunk=3)).strip() == answers[0]
        raw = serve(model, form.tokenizer)
        assert raw.generate([form.prompt_text(split.forget.rows[0])], new=8)[0] == answers[0]
        if case == "input":
            assert answers == ["I cannot answer that."] * 3
            assert all(set(d) == {"score", "threshold", "flagged", "policy"} for d in s.log[patch(case).edits[0].name].values())
            assert any(d["flagged"] for d in s.log[patch(case).edits[0].name].values())
        with pytest.raises(DataError, match="no prompt"):
            s.logits([])
    assert not guards(model)


def test_decisions_are_kept_without_text_and_not_for_ever(monkeypatch):
    import expunge.core.hooks as package

    monkeypatch.setattr(package, "LOG", 3)
    model, task, split = guarded("probe")
    with torch.no_grad():
        task.forward(model, task.collate(split.retain, torch.arange(8), None))
    log = guards(model)[patch("probe").edits[0].name].log
    assert len(log) == 3 and all(len(key) == 16 and isinstance(d["score"], float) for key, d in log.items())


@pytest.mark.parametrize("name", ["o3", "uld", "eco"])
def test_mixtures_of_experts_can_be_guarded(name):
    """Experts that are no linear layers stay as they are; the rest is as for other models."""
    model, task, split = small("causal_lm", moe=True)
    settings = {"strength": 0.5} if name == "eco" else {"epochs": 1.0, "batch_size": 8, "lr": 1e-2}
    made = METHODS[name](model, task, split, **settings)
    batch = task.collate(split.forget, torch.arange(4), None)
    with torch.no_grad():
        plain = task.forward(model, batch).logits
        undo = made.apply(model)
        out = task.forward(model, batch)
        assert not torch.equal(out.logits, plain)
        torch.testing.assert_close(task.forward(model, padded(batch, 3, token=9)).nll, out.nll, atol=1e-3, rtol=1e-4)
        undo.apply(model)
        assert torch.equal(task.forward(model, batch).logits, plain)
