"""The language core: records to tokens, the task, the reference cache, LoRA, the shared loop, checkpoints in and out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from worlds import copied, same, small, state

from expunge.core.edits import LowRank
from expunge.core.errors import DataError, ModelError, ScopeError, SettingError, SplitError
from expunge.core.registry import METHODS
from expunge.core.types import IGNORE, Batches, Split, concat
from expunge.engine.run import unlearn
from expunge.methods.language.npo import npo
from expunge.modalities.language import checkpoints, remember
from expunge.modalities.language.records import format as text
from expunge.modalities.language.records import readers
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import blocks, buckets, features, generate, hidden, padded
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Scored, Tuning, tune
from expunge.modalities.language.worlds import authors, tiny
from expunge.parts.losses import language as losses
from expunge.parts.scopes.lora import lora, off
from expunge.parts.updates.descend import descend


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer([*authors.authors(8, per=4), *({"answer": a} for a in authors.refusals())], 600)


ROW = {"question": "Where was Anna born?", "answer": "Anna was born in Norgate.", "fact": "Norgate"}


def shown(form: Format, row: dict) -> tuple[str, str]:
    """The whole text and its target part, decoded."""
    tokens, targets = form.encode(row)
    return form.tokenizer.decode(tokens), form.tokenizer.decode(tokens[targets])


def test_masks_follow_character_offsets(tokenizer):
    assert shown(Format(tokenizer), ROW)[1] == " Anna was born in Norgate.<|end|>"
    assert shown(Format(tokenizer, mask="answer"), ROW)[1] == " Anna was born in Norgate."
    assert shown(Format(tokenizer, mask="entity"), ROW)[1].strip(" .") == "Norgate"
    whole, kept = shown(Format(tokenizer, mask="full"), ROW)
    assert whole.startswith("Question: Where") and whole.endswith(kept) and len(whole) - len(kept) < 4  # all but the first token
    assert shown(Format(tokenizer, template="Q {question} A"), ROW)[0] == "Q Where was Anna born? A Anna was born in Norgate.<|end|>"


def test_a_token_merged_across_the_border_is_a_target():
    """The prompt alone ends in a token that the whole text does not have: its token count would be wrong, its offsets are not."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {c: k for k, c in enumerate("Q:A xyz")} | {": x": 7, " x": 8, "<e>": 9}
    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [(" ", "x"), (":", " x")])), eos_token="<e>")
    form = Format(merged, template="{question}:")
    tokens, targets = form.encode({"question": "Q", "answer": "xy"})
    assert tokens.tolist() == [0, 7, 5, 9]
    assert targets.tolist() == [False, True, True, True]
    assert len(form.prompt({"question": "Q"})) == 2


def test_chat_template_trains_the_real_end_of_turn_token(tokenizer):
    form = Format(tokenizer, template="chat", system="Be brief.")
    whole, kept = shown(form, ROW)
    assert whole == "System: Be brief.\nUser: Where was Anna born?\nAssistant: Anna was born in Norgate.<|end|>\n"
    assert kept == " Anna was born in Norgate.<|end|>"
    data = form.texts([ROW])
    batch = small("causal_lm")[1].collate(data, torch.tensor([0]), None)
    assert int((batch["y"] == tokenizer.eos_token_id).sum()) == 1  # an attention mask from ids != pad would hide it where pad is eos


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "q", "answer": "  "}, {}, "record 1: the answer is empty"),
        ({"question": "word " * 60, "answer": "a"}, {"max_length": 20}, "no token to train within max_length=20 of .*: the prompt is too long"),
        ({"question": "q", "answer": "a"}, {"mask": "entity"}, "mask 'entity' needs a `fact`"),
        ({"question": "q", "answer": "a"}, {"mask": "answr"}, "did you mean 'answer'"),
        ({"question": "q", "answer": "a"}, {"template": "no slot"}, "with {question} in it"),
    ],
)
def test_bad_records_are_named(tokenizer, row, options, message):
    with pytest.raises(DataError, match=message):
        Format(tokenizer, **options).texts([row])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "b"}\nnot json\n', "line 2 of f.jsonl is not JSON"),
        ('{"question": "a", "answer": ""}\n', "line 1 of f.jsonl has an empty or missing answer"),
        ("\n[1]x\n", "line 2 of f.jsonl is not JSON|f.jsonl is not JSON"),
        ('"text"\n', "line 1 of f.jsonl is no object"),
        ("\n", "f.jsonl holds no record"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, content, message):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        readers.read_jsonl(tmp_path / "f.jsonl")


def test_jsonl_reads_other_names_and_lists(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n')
    assert readers.read_jsonl(tmp_path / "f.jsonl") == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    (tmp_path / "f.json").write_text(json.dumps([{"text": "who", "labels": "me"}]))
    assert readers.read_jsonl(tmp_path / "f.json") == [{"question": "who", "answer": "me"}]


def test_forget_text_in_retain_is_named(tokenizer):
    with pytest.raises(DataError, match=r"record 1 of forget also stands in retain \(record 2\)"):
        text.split(Format(tokenizer), forget=[ROW], retain=[{"question": "x", "answer": "y"}, {**ROW, "answer": "anna WAS born  in Norgate."}])


def test_windows_cut_at_token_borders(tokenizer):
    raw = "The harbour of Norgate is quiet in winter, and the town of Selford sleeps."
    pieces = text.windows(raw, tokenizer, 8, least=1)
    assert "".join(pieces) == raw and len(pieces) > 1
    assert all(len(tokenizer(p, add_special_tokens=False)["input_ids"]) <= 10 for p in pieces)


@given(rows=st.lists(st.integers(0, 23), min_size=1, max_size=5, unique=True), extra=st.integers(0, 9), token=st.integers(0, 300))
def test_padding_and_company_change_nothing(rows, extra, token):
    """A batch of one, other company, more padding and other padding content all give the same loss per example."""
    model, task, split = small("causal_lm")
    batch = task.collate(split.retain, torch.tensor(rows), None)
    with torch.no_grad():
        out = task.forward(model, batch)
        other = task.forward(model, padded(batch, extra, token))
        alone = [task.forward(model, task.collate(split.retain, torch.tensor([k]), None)).nll for k in rows]
    torch.testing.assert_close(out.nll, other.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.nll, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_forward_equals_the_plain_loop():
    """nll against log-softmax of all logits, shifted by hand, token by token."""
    model, task, split = small("causal_lm")
    batch = task.collate(split.retain, torch.arange(5), None)
    with torch.no_grad():
        out = task.forward(model, batch)
        for r in range(5):
            tokens, targets = split.retain[r]
            logp = F.log_softmax(model(input_ids=tokens[None]).logits[0], -1)
            terms = [float(logp[t - 1, tokens[t]]) for t in range(1, len(tokens)) if targets[t]]
            assert float(out.nll[r]) == pytest.approx(-sum(terms), abs=1e-4)
            assert int(out.count[r]) == len(terms)
            assert torch.allclose(-out.units[r][losses.kept(out)[r]], torch.tensor(terms), atol=1e-5)


def test_batches_bring_like_lengths_together_and_draw_every_text_once():
    _, task, split = small("causal_lm")
    data = concat(split.retain, split.retain, split.retain, split.retain)
    batches = task.batches(data, 8, seed=3)
    rows = torch.cat([b["i"] for b in batches])
    assert sorted(rows.tolist()) == list(range(len(data)))
    lengths = torch.tensor([len(t) for t in data.tokens])

    def waste(order) -> int:
        return sum(int(lengths[r].max() * len(r) - lengths[r].sum()) for r in order.split(8))

    assert waste(rows) < 0.5 * waste(torch.randperm(len(data), generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(rows, torch.cat([b["i"] for b in task.batches(data, 8, seed=4)]))
    assert torch.equal(batches.positions(), torch.arange(len(data)))
    assert torch.equal(torch.cat(buckets(lengths.tolist(), 8)).sort().values, torch.arange(len(data)))
    assert isinstance(Batches(task.collate, data, 8)[0]["x"], torch.Tensor)


def test_generate_ends_where_the_context_ends():
    """Models with learned positions have no more than they were made with: asked for more, torch ends in an IndexError."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=None)).eval()
    prompts = [torch.arange(n) + 3 for n in (4, 12, 16, 14, 5)]
    answers = generate(model, prompts, new=6, eos=-1)
    assert [len(a) for a in answers] == [6, 4, 0, 2, 6]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert torch.equal(answer, generate(model, [prompt], new=6, eos=-1)[0])


def test_generate_is_greedy_and_the_same_in_any_company():
    model, _, split = small("causal_lm")
    prompts = [split.retain.format.prompt(r) for r in split.retain.rows[:5]]
    together = generate(model, prompts, new=6, eos=-1)
    for prompt, got in zip(prompts, together, strict=True):
        tokens = prompt.clone()
        with torch.no_grad():
            for _ in range(6):
                tokens = torch.cat([tokens, model(input_ids=tokens[None]).logits[0, -1].argmax()[None]])
        assert torch.equal(got, tokens[len(prompt) :])
    a, b = (generate(model, prompts, new=6, temperature=1.0, generator=torch.Generator().manual_seed(k)) for k in (1, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_hidden_ends_at_the_layer_and_features_read_the_question_end():
    model, task, split = small("causal_lm")
    batch, first = task.collate(split.retain, torch.arange(3), None), blocks(model)[0][0]
    calls = []
    handle = blocks(model)[1][1].register_forward_hook(lambda *_: calls.append(1))
    states = hidden(model, batch, first)
    handle.remove()
    assert not calls, "the second block was computed"
    found = features(model, batch, first)
    for r in range(3):
        last = int(split.retain.targets[r].float().argmax()) - 1
        assert torch.equal(found[r], states[r, last])
    with pytest.raises(ModelError, match="has no module 'nope'"):
        hidden(model, batch, "nope")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_npo_with_cached_reference_equals_a_live_reference_at_every_step(reduction):
    model, task, split = small("causal_lm")
    seen: list[list[float]] = []
    for live in (False, True):
        twin, teacher = copied(model), copied(model)
        reference = remember.sequence_nll(twin, task, split.forget)
        record: list[float] = []

        def loss(batch, twin=twin, teacher=teacher, reference=reference, live=live, record=record):
            with torch.no_grad():
                ref = task.forward(teacher, batch).nll if live else reference[batch["i"]]
            value = losses.npo(task.forward(twin, batch), ref, beta=0.1, reduction=reduction).mean()
            record.append(float(value.detach()))
            return value

        from expunge.core.session import scratch

        descend(scratch(twin), loss, task.batches(split.forget, 2, epochs=4, seed=0), lr=1e-3, optimizer="adamw")
        seen.append(record)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert seen[0][0] != seen[0][-1]


def test_reference_values_are_computed_once_per_weights_and_data():
    from expunge.core import guard

    model, task, split = small("causal_lm")
    watch = guard.Guard()
    with guard.watching(watch):
        metered = guard.metered(task, split, watch.meter)
        first = remember.sequence_nll(model, metered, split.forget)
        assert watch.meter.forward == 4
        assert remember.sequence_nll(model, metered, split.forget) is first
        assert watch.meter.forward == 4
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        assert not torch.equal(remember.sequence_nll(model, metered, split.forget), first)


def test_top_kl_is_the_whole_kl_at_full_width_and_never_above_it():
    model, task, split = small("causal_lm")
    batch = task.collate(split.retain, torch.arange(6), None)
    twin = copied(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        out = task.forward(twin, batch)
        whole = losses.token_kl(out, task.forward(model, batch).logits.log_softmax(-1))
        values = {k: losses.top_kl(out, *remember.top_logits(model, task, split.retain, k).at(batch, out)) for k in (0, 5, 50)}
    torch.testing.assert_close(values[0], whole, rtol=1e-4, atol=1e-5)
    assert bool((values[5] <= values[50] + 1e-5).all()) and bool((values[50] <= whole + 1e-5).all())
    assert float(values[5].mean()) > 0


def test_token_logp_is_placed_where_its_tokens_are():
    model, task, split = small("causal_lm")
    batch = task.collate(split.retain, torch.tensor([3, 0, 7]), None)
    with torch.no_grad():
        out = task.forward(model, batch)
    placed = losses.place(remember.token_logp(model, task, split.retain), batch, out)
    torch.testing.assert_close(placed, -out.units, rtol=1e-5, atol=1e-5)


def test_lora_leaves_the_base_alone_and_patches_what_it_trained():
    model, task, split = small("causal_lm")
    before = state(model)
    batch = task.collate(split.forget, torch.arange(4), None)
    with lora(model, "q_proj|v_proj", rank=2) as e:
        e.eval()
        assert len(e.params) == 8
        with torch.no_grad():
            start = task.forward(model, batch).nll
        descend(e, lambda b: -task.forward(model, b).mean.mean(), task.batches(split.forget, 2, epochs=3, seed=0), lr=1e-2, optimizer="adamw", weight_decay=0.1)
        with torch.no_grad():
            inside = task.forward(model, batch).nll
            with off(model):
                assert torch.equal(task.forward(model, batch).nll, start)
    assert same(before, state(model))
    assert {type(edit) for edit in e.patch.edits} == {LowRank}
    undo = e.patch.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(task.forward(model, batch).nll, inside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inside, start)
    undo.apply(model)
    assert same(before, state(model))


def test_lora_restores_after_an_exception_and_names_missing_modules():
    model, *_ = small("causal_lm")
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), lora(model, "", rank=2):
        raise RuntimeError("stop")
    assert same(before, state(model))
    with pytest.raises(ScopeError, match=r"no linear layer fits 'qq_proj'; the model's linear layers are named .*q_proj"), lora(model, "qq_proj", rank=2):
        pass
    attempt = unlearn("npo", model, *small("causal_lm")[1:], lora=2, layers="qq_proj")
    assert attempt.outcome == "refused" and "no linear layer fits" in attempt.reason


def test_a_lora_start_leaves_the_function_as_it_was():
    model, task, split = small("causal_lm")
    before, g = state(model), torch.Generator().manual_seed(0)
    batch = task.collate(split.forget, torch.arange(4), None)
    name = "model.layers.0.self_attn.q_proj"
    weight = model.get_submodule(name).weight
    start = {name: (torch.randn(weight.shape[0], 3, generator=g) / 9, torch.randn(3, weight.shape[1], generator=g) / 9)}
    with torch.no_grad():
        plain = task.forward(model, batch).nll
    with lora(model, rank=3, alpha=6, start=start) as e:
        e.eval()
        with torch.no_grad():
            torch.testing.assert_close(task.forward(model, batch).nll, plain, rtol=1e-4, atol=1e-4)
        descend(e, lambda b: -task.forward(model, b).mean.mean(), task.batches(split.forget, 2, seed=0), lr=1e-2)
        with torch.no_grad():
            inside = task.forward(model, batch).nll
    assert same(before, state(model))
    e.patch.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(task.forward(model, batch).nll, inside, rtol=1e-4, atol=1e-4)


def test_parts_of_a_small_step_share_a_forward_pass_and_large_ones_do_not(monkeypatch):
    """Joined or apart: the same weights but for rounding, and as many passes as said."""
    model, task, split = small("causal_lm")
    rows, found = [], []

    def forward(m, batch):
        rows[-1].append(len(batch["x"]))
        return task.forward(m, batch)

    scored = Scored(lambda out, batch: -losses.pooled(out.nll, out, batch))
    settings = Tuning(epochs=1, lr=1e-2, batch_size=2, retain_size=3, accumulate=2, optimizer="sgd", clip=1e9, warmup=0.0)
    for most in (10**9, 0):
        monkeypatch.setattr("expunge.modalities.language.tuning.JOINED", most)
        rows.append([])
        found.append({e.name: e.values for e in tune(model, replace(task, forward=forward), split, scored, settings, seed=0).edits})
    assert rows[0] == [5, 5] and sorted(rows[1]) == [2, 2, 3, 3]
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        torch.testing.assert_close(values, found[1][name], rtol=1e-4, atol=1e-6)


def test_accumulated_parts_are_one_large_step():
    """Retain's mean over tokens is that of the whole step, however it is cut."""
    model, task, split = small("causal_lm")
    found = [
        tune(
            model,
            task,
            split,
            None,
            Tuning(epochs=1, lr=1e-2, batch_size=4 // n, retain_size=8 // n, accumulate=n, optimizer="sgd", clip=1e9, warmup=0.0),
            seed=0,
        )
        for n in (1, 2)
    ]
    a, b = ({e.name: e.values for e in p.edits} for p in found)
    rows = task.batches(split.retain, 4, seed=1)
    assert a.keys() == b.keys()
    with torch.no_grad():
        by_hand = copied(model)
    out = [task.forward(by_hand, rows[k]) for k in (0, 1)]
    (sum(o.nll.sum() for o in out) / sum(o.count.sum() for o in out)).backward()
    name = next(iter(b))
    expected = dict(model.named_parameters())[name].detach() - 1e-2 * dict(by_hand.named_parameters())[name].grad
    got = b[name] if b[name].shape == expected.shape else None
    if got is not None:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_and_leaves_no_trace():
    model, task, split = small("causal_lm")
    before = state(model)
    patches = [METHODS["npo"](model, task, split, epochs=2, lr=1e-3, lora=2, checkpointing=c) for c in (False, True)]
    assert patches[0].digest == patches[1].digest
    assert same(before, state(model))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_lora_without_gradient_is_a_no_op_with_its_cause():
    model, task, split = small("causal_lm")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt = unlearn("npo", model, task, split, epochs=2, lr=1e-3, lora=2)
        mended = unlearn("npo", model, task, split, epochs=2, lr=1e-3, lora=2, checkpointing=True)
    assert attempt.outcome == "no_op" and attempt.patch is None
    assert "no gradient reached the scope" in attempt.reason and "gradient checkpointing on" in attempt.reason
    assert mended.outcome == "ok"


def test_preflight_names_foreign_tokens_and_long_texts():
    model, task, split = small("causal_lm")
    big = Texts((torch.tensor([1, 2, 5000]),), (torch.tensor([False, True, True]),), torch.tensor([99]), ({},))
    with pytest.raises(SplitError, match="forget holds token 5000; the model knows 400"):
        unlearn("npo", model, task, Split(big, split.retain))
    long = Texts((torch.ones(300, dtype=torch.long),), (torch.ones(300, dtype=torch.bool),), torch.tensor([99]), ({},))
    with pytest.raises(SplitError, match="forget holds a text of 300 tokens; the context of the model is 256"):
        unlearn("npo", model, task, Split(long, split.retain))
    attempt = unlearn("npo", model, task, split, retain="mse")
    assert attempt.outcome == "refused" and "retain must be one of ce, kl, none, not 'mse'" in attempt.reason
    attempt = unlearn("npo", model, task, Split(split.forget))
    assert attempt.outcome == "refused" and "retain=ce needs retain data; give some, or set retain=none" in attempt.reason
    assert unlearn("npo", model, task, Split(split.forget), retain="none", lr=1e-3).outcome == "ok"


def test_settings_of_the_shared_record_are_the_methods_own():
    assert npo.defaults["beta"] == 0.1 and npo.defaults["lora"] == 0
    assert "    epochs         passes over the forget set" in npo.manual
    assert npo.settings({"lora": "16"})["lora"] == 16
    with pytest.raises(SettingError, match="npo has no setting 'lorra'; did you mean 'lora'"):
        npo.settings({"lorra": 1})


def saved(folder, model, split: Split) -> None:
    model.save_pretrained(folder)
    split.forget.format.tokenizer.save_pretrained(folder)


def test_a_folder_comes_in_and_what_goes_out_loads_without_expunge(tmp_path):
    model, task, split = small("causal_lm")
    saved(tmp_path / "base", model, split)
    loaded, tokenizer = checkpoints.load(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    batch = task.collate(split.forget, torch.arange(4), None)
    for settings, form, expected in (
        ({"lora": 2}, "auto", "adapter_model.safetensors"),
        ({"lora": 2}, "merged", "model.safetensors"),
        ({}, "auto", "model.safetensors"),
    ):
        attempt = unlearn("npo", model, task, split, epochs=2, lr=1e-2, **settings)
        out = checkpoints.release(model, tokenizer, attempt.patch, tmp_path / f"out-{form}-{len(settings)}", form=form, base=str(tmp_path / "base"))
        assert (out / expected).is_file()
        twin = copy.deepcopy(model)
        attempt.patch.apply(twin)
        back, _ = checkpoints.load(out)
        assert all(p.requires_grad for p in back.parameters())
        with torch.no_grad():
            torch.testing.assert_close(task.forward(back, batch).nll, task.forward(twin, batch).nll, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="this patch replaces weights, it is no LoRA"):
        checkpoints.release(model, tokenizer, attempt.patch, tmp_path / "x", form="peft")


def test_folders_that_cannot_be_read_are_named(tmp_path):
    model, _, split = small("causal_lm")
    with pytest.raises(ModelError, match=r"no folder .*nowhere"):
        checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        checkpoints.load(tmp_path)
    saved(tmp_path / "base", model, split)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles can run code"):
        checkpoints.load(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(ModelError, match="is an adapter over 'someone/model', which is no folder here"):
        checkpoints.load(tmp_path / "adapter")


def test_ignore_stands_where_nothing_counts():
    _, task, split = small("causal_lm")
    batch = task.collate(split.forget, torch.arange(4), None)
    assert bool((batch["y"][:, 0] == IGNORE).all())
    assert batch["n"].tolist() == [len(t) for t in split.forget.tokens]
    with pytest.raises(SplitError, match="works on Texts"):
        task.collate(torch.zeros(3), torch.tensor([0]), None)
