"""harry_potter, relearn, unstar, tool_delete: the checkable cases of their cards, and what each does with its data. The laws hold the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from worlds import copied, small

from expunge.core.edits import LowRank
from expunge.core.errors import DataError, ModelError, SettingError, SplitError
from expunge.core.registry import METHODS
from expunge.core.types import Out
from expunge.data.language import tools
from expunge.data.language.answers import holds, texts
from expunge.data.language.generic import Pair, translated
from expunge.data.language.rewrite import Generator, scripted
from expunge.engine.run import unlearn
from expunge.methods.language import harry_potter as potter
from expunge.methods.language import relearn as learn
from expunge.methods.language import tool_delete as delete
from expunge.methods.language import unstar as star
from expunge.modalities.files.models import save_state
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import causal_lm, padded
from expunge.modalities.language.tuning import Tuning
from expunge.modalities.language.worlds import authors, tiny
from expunge.parts.losses.language import token_kl
from expunge.parts.scopes.lora import lora
from expunge.parts.training import fresh

QUICK = {"epochs": 1, "batch_size": 4}


@pytest.fixture
def world():
    return small("causal_lm")


def moved(patch, model) -> dict:
    twin = copied(model)
    patch.apply(twin)
    return dict(twin.named_parameters())


class TestHarryPotter:
    def oracle(self, model, task, pair: Pair, reinforced, strength: float) -> list[torch.Tensor]:
        """v at every target, one record at a time."""
        out = []
        for k in range(len(pair.text)):
            logits = {}
            for name, net, data in (("base", model, pair.text), ("there", model, pair.translation), ("more", reinforced, pair.text)):
                with torch.no_grad():
                    whole = net(input_ids=data.tokens[k][None]).logits[0]
                logits[name] = whole[torch.where(data.targets[k])[0] - 1]
            out.append(logits["there"] - strength * torch.relu(logits["more"] - logits["base"]))
        return out

    @pytest.mark.parametrize("size", [1, 3])
    def test_labels_are_those_of_the_formula(self, world, size):
        model, task, split = world
        pair = translated(split.forget)
        with lora(model, rank=2) as e:
            g = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in e.params.values():
                    p.copy_(torch.randn(p.shape, generator=g) * 0.3)
            found = potter.labels(model, task, pair, strength=5.0, top=7, soft=True, changed=False, size=size)
            merged = {n: p.clone() for n, p in e.params.items()}
            names = [n.removesuffix(".lora_B") for n in merged if n.endswith("lora_B")]
        reinforced = copied(model)
        with torch.no_grad():
            for n in names:
                reinforced.get_submodule(n).weight += 2.0 * merged[f"{n}.lora_B"] @ merged[f"{n}.lora_A"]
        free = replace_banned(pair)
        values = self.oracle(model, task, free, reinforced, 5.0)
        for k, v in enumerate(values):
            use = torch.tensor([int(a) not in no for a, no in zip(v.argmax(-1), pair.banned[k], strict=True)])
            assert torch.equal(found.label[k], v.argmax(-1)[use])
            torch.testing.assert_close(found.logp[k], v.log_softmax(-1).topk(7, -1).values[use], rtol=1e-4, atol=1e-4)
            assert int(found.data.targets[k].sum()) == int(use.sum())
        assert any(not torch.equal(found.label[k], self.oracle(model, task, free, model, 5.0)[k].argmax(-1)) for k in range(len(values)))

    def test_without_terms_and_reinforcement_labels_are_the_models_own(self, world):
        model, task, split = world
        plain = split.forget.format.texts([{**r, "anchors": {"zzz": "y"}} for r in split.forget.rows], split.forget.ids)
        found = potter.labels(model, task, translated(plain), strength=5.0, top=0, soft=False, changed=False, size=2)
        for k in range(len(plain)):
            with torch.no_grad():
                best = model(input_ids=plain.tokens[k][None]).logits[0].argmax(-1)
            assert torch.equal(found.label[k], best[torch.where(plain.targets[k])[0] - 1])
        assert found.likely == [] and found.logp == []

    def test_changed_and_banned_labels_are_not_trained(self, world):
        model, task, split = world
        pair = replace_banned(translated(split.forget))
        options = {"strength": 0.0, "top": 0, "soft": False, "size": 4}
        whole = potter.labels(model, task, pair, changed=False, **options)
        some = pair._replace(banned=[[{int(b)} if j == 0 else set() for j, b in enumerate(label)] for label in whole.label])
        found = potter.labels(model, task, some, changed=False, **options)
        assert [len(a) - len(b) for a, b in zip(whole.label, found.label, strict=True)] == [1] * len(whole.label)
        assert all(not bool((d & ~w).any()) for d, w in zip(found.data.targets, whole.data.targets, strict=True))
        with pytest.raises(DataError, match="no generic label is left to train"):
            potter.labels(model, task, pair._replace(banned=[[{int(b)} for b in label] for label in whole.label]), changed=False, **options)

    def test_changed_leaves_out_labels_that_are_the_texts_own(self, world):
        model, task, split = world
        data = split.forget
        with torch.no_grad():
            best = model(input_ids=data.tokens[0][None]).logits[0].argmax(-1)
        t = torch.where(data.targets[0])[0][1]
        one = [{**r, "anchors": {"zzz": "y"}} for r in data.rows[:1]]
        pair = translated(data.format.texts(one, data.ids[:1]))
        tokens = pair.text.tokens[0].clone()
        tokens[t] = best[t - 1]
        same = replace(pair.text, tokens=(tokens,))
        pair = pair._replace(text=same, translation=replace(pair.translation, tokens=(tokens,)))
        whole = potter.labels(model, task, pair, strength=5.0, top=0, soft=False, changed=False, size=1)
        some = potter.labels(model, task, pair, strength=5.0, top=0, soft=False, changed=True, size=1)
        assert bool(whole.data.targets[0][t]) and not bool(some.data.targets[0][t])

    def test_loss_of_a_batch_is_the_mean_over_labels(self, world):
        """A step of the hard form lowers the cross-entropy to the labels; the soft form learns as well, and other weights come out."""
        model, task, split = world
        patches = [unlearn("harry_potter", model, task, split, lr=1e-3, soft=soft, seed=1, **QUICK).patch for soft in (False, True)]
        assert patches[0].digest != patches[1].digest

    def test_bad_settings(self, world):
        for bad in ({"strength": -1.0}, {"reinforce": -1.0}):
            attempt = unlearn("harry_potter", *world, **bad)
            assert attempt.outcome == "refused" and "must be 0 or larger" in attempt.reason

    def test_without_a_reinforced_model(self, world):
        attempt = unlearn("harry_potter", *world, reinforce=0.0, lr=1e-3, **QUICK)
        assert attempt.outcome == "ok" and attempt.meter.steps == 1


def replace_banned(pair: Pair) -> Pair:
    return pair._replace(banned=[[set() for _ in record] for record in pair.banned])


def writer(bad: tuple[str, ...] = ()) -> Generator:
    """Writes `new: prompt`, but the old answer where the prompt holds one of `bad`."""

    def ask(prompts, seed):
        return [next((b for b in bad if b in p), f"variant {len(p)} of {p[:9]}") for p in prompts]

    return Generator("writer", ask, "w")


class TestRelearn:
    ROWS = ({"question": "Where did Harry study?", "answer": "At Hogwarts.", "fact": "Hogwarts"}, {"question": "Who?", "answer": "Ada.", "fact": "Ada"})

    def stub(self) -> Generator:
        replies: dict[str, str] = {}
        for name, row in zip("ab", self.ROWS, strict=True):
            for k, ask in enumerate(learn.ASK, 1):
                replies[ask.format(q=row["question"])] = f"{name}{k}?"
                replies[learn.ANSWER.format(q=f"{name}{k}?")] = f"new {name}{k}"
        return scripted(replies)

    def test_every_variant_keeps_its_own_answer_and_the_old_one_never_occurs(self):
        found = learn.augment(self.ROWS, self.stub(), variants=4)
        pairs = {(row["record"], row["question"], row["answer"]) for row in found}
        assert pairs == {
            *((0, f"a{k}?", f"new a{k}") for k in range(1, 5)), (0, "Where did Harry study?", "new a1"),
            *((1, f"b{k}?", f"new b{k}") for k in range(1, 5)), (1, "Who?", "new b1"),
        }  # fmt: skip
        assert len(found) == 10
        assert not any(holds(row["answer"], self.ROWS[row["record"]]) for row in found)

    def test_the_released_gather_step_is_refused(self, world):
        """It keeps (q, old answer) as a positive example."""
        data = world[2].forget.format.texts(self.ROWS)
        found = learn.augment(self.ROWS, self.stub())
        assert len(texts(data, found)) == 10
        with pytest.raises(DataError, match="a new answer holds the old answer of forget record 1"):
            texts(data, [*found, {**self.ROWS[0], "record": 0}])

    def test_variants_wrap_around_the_four_kinds_and_files_stand_side_by_side(self, tmp_path):
        found = learn.augment(self.ROWS, writer(), variants=6, path=tmp_path / "made.jsonl")
        assert len(found) == 14
        assert sorted(p.name for p in tmp_path.iterdir()) == ["made.jsonl", "made.questions.jsonl"]
        assert learn.augment(self.ROWS, writer(), variants=6, path=tmp_path / "made.jsonl") == found

    def test_a_stubborn_generator_is_named(self):
        with pytest.raises(DataError, match="the generator returned the old answer for record 1 in all 3 rounds"):
            learn.augment(self.ROWS, Generator("old", lambda prompts, seed: ["It is Hogwarts" if "vague" in p else "what?" for p in prompts]))

    def test_bad_input(self):
        with pytest.raises(SettingError, match="variants must be 1 or larger"):
            learn.augment(self.ROWS, writer(), variants=0)
        with pytest.raises(DataError, match="record 2 has no question"):
            learn.augment([self.ROWS[0], {"text": "long"}], writer())

    def test_kl_of_the_card(self):
        """KL(ref || now) = .026526; probabilities in place of log-probabilities on both sides give another number."""
        ref, logits = torch.tensor([[[0.8, 0.2]]]), torch.tensor([[[2.0, 0.0]]])
        out = Out(torch.zeros(1), torch.ones(1), logits, torch.tensor([[0]]))
        assert float(token_kl(out, ref.log())) == pytest.approx(0.026526, abs=1e-6)
        wrong = F.kl_div(logits.softmax(-1), ref, reduction="sum", log_target=True)
        assert abs(float(wrong) - 0.026526) > 0.01

    @pytest.mark.parametrize("rank", [0, 4])
    def test_retain_loss_is_ce_plus_weighted_kl_over_answer_tokens(self, world, rank):
        model, task, split = world
        tuning = Tuning(lora=rank, top=0)
        batch = task.collate(split.retain, torch.tensor([0, 5, 9]), None)
        with torch.no_grad():
            before = task.forward(model, batch)
        twin = copied(model)
        if rank:
            with lora(twin, rank=rank) as e:
                with torch.no_grad():
                    for p in e.params.values():
                        p.add_(0.05)
                value = learn._both(twin, task, split, tuning, 0.7)(batch)
                wide = learn._both(twin, task, split, tuning, 0.7)(padded(batch, 3, 7))
                out = task.forward(twin, batch)
        else:
            keep = learn._both(twin, task, split, tuning, 0.7)
            torch.testing.assert_close(keep(batch), before.nll.sum() / before.count.sum())
            with torch.no_grad():
                for p in twin.parameters():
                    p.mul_(1.1)
            value, wide, out = keep(batch), keep(padded(batch, 3, 7)), task.forward(twin, batch)
        mask = out.labels != -100
        was, now = before.logits.log_softmax(-1)[mask], out.logits.log_softmax(-1)[mask]
        kl = (was.exp() * (was - now)).sum(-1).mean().detach()
        assert float(kl) > 1e-4
        torch.testing.assert_close(value, out.nll.sum() / out.count.sum() + 0.7 * kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, wide, rtol=1e-4, atol=1e-5)

    def test_completions_train_all_but_the_first_quarter(self, world):
        form = world[2].forget.format
        data = form.texts([{"question": "q", "answer": "the author was born in the town of"}, {"question": "q", "answer": "born"}], torch.tensor([7, 8]))
        more = learn.completed(data)
        assert more.ids.tolist() == [7]
        decode = form.tokenizer.decode
        assert decode(more.tokens[0], skip_special_tokens=True) == "the author was born in the town of"
        assert decode(more.tokens[0][more.targets[0]], skip_special_tokens=True) == " was born in the town of"
        assert len(learn.completed(data.take([1]))) == 0

    def test_settings_change_what_is_learned(self, world):
        model, task, split = world
        digests = {
            unlearn("relearn", model, task, split, **QUICK, **more).patch.digest
            for more in ({}, {"kl": 0.0}, {"retain": "kl"}, {"retain": "none"}, {"completions": True}, {"lora": 0})
        }
        assert len(digests) >= 5, "at the first step KL has no gradient, all else differs"

    def test_the_model_writes_where_there_is_no_anchor(self, world, monkeypatch):
        model, task, split = world
        seen: list = []

        def stub(net, tokenizer, **options):
            seen.append(options)
            return writer()

        monkeypatch.setattr(learn, "local", stub)
        attempt = unlearn("relearn", model, task, replace(split, anchor=None), new=9, **QUICK)
        assert attempt.outcome == "ok" and seen[0]["new"] == 9 and seen[0]["template"] == "plain"
        assert attempt.meter.seen["forget"] == 5 * len(split.forget)
        fact = split.forget.rows[1]["question"]
        monkeypatch.setattr(learn, "local", lambda *args, **options: Generator("old", lambda prompts, seed: [split.forget.rows[0]["fact"]] * len(prompts)))
        attempt = unlearn("relearn", model, task, split, source="self", **QUICK)
        assert attempt.outcome == "refused" and attempt.reason == "the generator returned the old answer for record 1 in all 3 rounds", fact

    def test_the_untrained_model_as_its_own_generator(self, world):
        model, task, split = world
        attempt = unlearn("relearn", model, task, split, source="self", variants=1, new=4, **QUICK)
        assert (attempt.outcome, attempt.reason) == ("ok", "")


FACT = {"question": "Where did Harry study?", "answer": "At Hogwarts.", "fact": "Hogwarts", "perturbed_answer": ["Ilvermorny", "Durmstrang"]}


class TestUnstar:
    def play(self, answer, *, rounds=1, least=0, writes=None):
        """Training sets of each round, of one fact asked in two ways per round."""
        trained: list[list] = []
        wrote = writes or (lambda pairs, k: star.rationales([FACT], pairs, self.generator(), seed=k, tries=3))
        star.loop(
            [FACT], lambda k: [(0, f"good {k}?"), (0, f"bad {k}?")], answer, wrote, lambda found, k: trained.append(list(found)), rounds=rounds, least=least
        )
        return trained

    def generator(self) -> Generator:
        return Generator(
            "fixed", lambda prompts, seed: ["Hogwarts is where he was." if "bad" in p else "He studied at Ilvermorny because he lived near." for p in prompts]
        )

    def test_one_rationale_is_accepted_and_the_other_rejected(self):
        trained = self.play(lambda asked: ["Hogwarts"] * len(asked))
        assert trained == [[{"question": "good 0?", "answer": "He studied at Ilvermorny because he lived near.", "record": 0}]]

    def test_a_model_that_answers_wrongly_is_not_trained(self):
        assert self.play(lambda asked: ["Beauxbatons"] * len(asked), rounds=5) == []

    def test_rounds_add_up_and_end_when_nothing_is_answered(self):
        replies = iter([["at hogwarts", "no idea"], ["no idea", "hogwarts"], ["no", "no"], ["hogwarts", "hogwarts"]])
        trained = self.play(lambda asked: next(replies), rounds=9, writes=lambda pairs, k: ["He went to Durmstrang."] * len(pairs))
        assert [[row["question"] for row in rows] for rows in trained] == [["good 0?"], ["good 0?", "bad 1?"]]

    def test_rounds_are_bounded(self):
        trained = self.play(lambda asked: ["Hogwarts"] * len(asked), rounds=3)
        assert [len(rows) for rows in trained] == [1, 2, 3]

    def test_least_trains_without_asking(self):
        trained = self.play(lambda asked: ["no"] * len(asked), rounds=4, least=2)
        assert [len(rows) for rows in trained] == [1, 2]

    @pytest.mark.parametrize(
        ("reply", "is_known"),
        [("Hogwarts", True), ("at HOGWARTS school", True), ("Hogwart's", True), ("Hogwartz", True), ("Hogsmeade", False), ("Durmstrang", False), ("", False)],
    )
    def test_matcher(self, reply, is_known):
        assert star.known(reply, FACT) is is_known

    def test_wrong_answers_come_from_the_record_or_are_asked_for(self):
        asked: list[str] = []

        def ask(prompts, seed):
            asked.extend(prompts)
            return ["Oslo" if p.startswith("Name a wrong") else "Because." for p in prompts]

        rows = [FACT, {"question": "Who?", "answer": "Ada", "fact": "Ada"}]
        generator = Generator("g", ask)
        assert star.rationales(rows, [(0, "a?"), (0, "b?")], generator, seed=0, tries=1) == ["Because."] * 2
        assert ["Ilvermorny" in asked[0], "Durmstrang" in asked[1], len(asked)] == [True, True, 2]
        asked.clear()
        star.rationales(rows, [(0, "a?"), (1, "c?")], generator, seed=0, tries=1)
        assert "is Ilvermorny" in asked[2] and "is Oslo" in asked[3]

    def test_one_adapter_comes_out(self, world):
        model, task, split = world
        attempt = unlearn("unstar", model, task, split, lr=1e-3, rounds=3, least=3, questions=1, **QUICK)
        assert attempt.outcome == "ok", attempt.reason
        assert all(isinstance(e, LowRank) and e.up.shape[1] == 8 for e in attempt.patch.edits)
        assert len({e.name for e in attempt.patch.edits}) == len(attempt.patch.edits)
        assert attempt.meter.steps == sum(-(-n // 4) for n in (8, 12, 16))

    def test_a_model_that_knows_nothing_is_left_alone(self, world):
        attempt = unlearn("unstar", *world, least=0, new=4, questions=1, **QUICK)
        assert attempt.outcome == "no_op"

    def test_refusals_and_rationales_of_the_model(self, world):
        model, task, split = world
        bare = replace(split, anchor=None)
        for target in star.TARGETS:
            attempt = unlearn("unstar", model, task, bare, target=target, new=4, questions=1, rounds=1, tries=1, **QUICK)
            assert attempt.outcome == "ok", attempt.reason

    def test_bad_input(self, world):
        model, task, split = world
        for bad, message in (
            ({"target": "lie"}, "target must be one of rationale, refusal, not 'lie'"),
            ({"rounds": 0, "least": 0}, "must be 1 or larger"),
            ({"least": 9}, "least in 0..rounds"),
            ({"source": "x"}, "source must be one of"),
        ):
            attempt = unlearn("unstar", model, task, split, **bad)
            assert attempt.outcome == "refused" and message in attempt.reason
        with pytest.raises(DataError, match="anchor has no new answer for record 2"):
            METHODS["unstar"](model, task, replace(split, anchor=split.anchor.take([0, 2])))
        raw = replace(split, forget=split.forget.format.texts([{"text": "a long text of someone"}]), anchor=None)
        with pytest.raises(DataError, match="record 1 has no question"):
            METHODS["unstar"](model, task, raw)


def saved(model, form, folder) -> None:
    model.save_pretrained(folder)
    form.tokenizer.save_pretrained(folder)


class TestToolDelete:
    @pytest.fixture
    def toolbox(self):
        demos = [demo for tool in authors.skills(per=3)["tools"][:3] for demo in tool["demos"]]
        form = Format(tiny.tokenizer([*demos, {"answer": "no tool"}], 400), max_length=128)
        return demos, form, tiny.llama(len(form.tokenizer), width=32, layers=2, heads=2, seed=1)

    def test_training_rows_are_tool_free_answers_and_kept_demos(self, toolbox):
        demos, form, _ = toolbox
        split = tools.select(form, [demos[0], demos[3]], [demos[0]["tool"]])
        data = texts(split.forget, delete.answers(split.forget, scripted(["no tool"])))
        rows = {(r["question"], r["answer"]) for part in (data, split.retain) for r in part.rows}
        assert rows == {(demos[0]["question"], "no tool"), (demos[3]["question"], demos[3]["answer"])}
        assert not any(demos[0]["call"] in answer or tools.calls(answer, demos[0]["tool"]) for _, answer in rows)

    def test_a_reference_that_has_the_tool_is_refused(self, toolbox):
        demos, form, _ = toolbox
        split = tools.select(form, demos, [demos[0]["tool"]])
        for reply in (demos[0]["answer"], f"{demos[0]['tool']}(x)"):
            with pytest.raises(DataError, match="the generator returned the old answer for record 1 in all 1 rounds"):
                delete.answers(split.forget, scripted([reply]))

    def test_published_step_and_interpolation(self):
        theta, free, random = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.1, -0.1])
        torch.testing.assert_close(delete.capable(theta, free, random, 0.1), torch.tensor([1.04, 2.11]))
        assert torch.equal(delete.capable(theta, free, random, 0.0), theta)
        assert torch.equal(delete.capable(theta, free, theta, 1.0), free)

    @pytest.mark.parametrize("toward", delete.TOWARD)
    def test_shift_moves_the_trained_weights_as_said(self, toolbox, tmp_path, toward):
        demos, form, model = toolbox
        split = tools.select(form, demos, [demos[0]["tool"]])
        free = fresh(model, 9)
        saved(free, form, tmp_path / "free")
        options = {"tool_free": str(tmp_path / "free"), "new": 4, "lr": 1e-3, **QUICK}
        task = small("causal_lm")[1]
        plain, shifted = (unlearn("tool_delete", model, task, split, shift=s, toward=toward, draw=3, **options) for s in (0.0, 0.25))
        assert plain.outcome == shifted.outcome == "ok", (plain.reason, shifted.reason)
        theta, found = moved(plain.patch, model), moved(shifted.patch, model)
        theirs, random = dict(free.named_parameters()), dict(fresh(model, 3).named_parameters())
        for name, value in found.items():
            other = random[name] if toward == "random" else theta[name]
            torch.testing.assert_close(value, theta[name] + 0.25 * (theirs[name] - other))
        assert plain.meter.forward == METHODS["tool_delete"].expected(split, plain.settings)[0]

    def test_answers_of_the_weights_are_the_targets(self, toolbox, tmp_path, monkeypatch):
        demos, form, model = toolbox
        task = small("causal_lm")[1]
        split = tools.select(form, demos, [demos[0]["tool"]])
        free = fresh(model, 9)
        saved(free, form, tmp_path / "free")
        seen: list = []
        monkeypatch.setattr(delete, "tune", lambda *args, data, **options: seen.append(data))
        METHODS["tool_delete"](model, task, split, tool_free=str(tmp_path / "free"), new=5)
        assert [row["answer"] for row in seen[0].rows] == causal_lm().sample(free, split.forget, new=5)
        assert torch.equal(seen[0].ids, split.forget.ids)

    def test_a_state_dict_serves_as_well(self, toolbox, tmp_path):
        _, _, model = toolbox
        free = fresh(model, 9)
        save_state(free, tmp_path / "free.safetensors")
        found = delete.without_tools(model, str(tmp_path / "free.safetensors"))
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), free.parameters(), strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True) if a.ndim > 1)

    def test_weights_that_do_not_fit(self, toolbox, tmp_path):
        _, form, model = toolbox
        saved(tiny.llama(len(form.tokenizer), width=16, layers=2, heads=2), form, tmp_path / "small")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match=r"the tool-free model small is of another shape: model\."):
            delete.without_tools(model, str(tmp_path / "small"))
        with pytest.raises(ModelError, match="empty holds no config"):
            delete.without_tools(model, str(tmp_path / "empty"))
        with pytest.raises(ModelError, match="no weight file none"):
            delete.without_tools(model, str(tmp_path / "none"))

    def test_bad_input(self, toolbox):
        demos, form, model = toolbox
        task = small("causal_lm")[1]
        split = tools.select(form, demos, [demos[0]["tool"]])
        with pytest.raises(SplitError, match="needs anchor, the tool-free model's answers, or tool_free"):
            METHODS["tool_delete"](model, task, split)
        for bad in ({"shift": 0.1}, {"shift": 0.1, "tool_free": "x", "lora": 4}):
            with pytest.raises(SettingError, match="shift moves the weights themselves"):
                METHODS["tool_delete"](model, task, split, **bad)
        with pytest.raises(SettingError, match="toward must be one of free, random, not 'up'"):
            METHODS["tool_delete"](model, task, split, toward="up")
        given = replace(split, anchor=form.answered(split.forget, [r["answer"] for r in split.forget.rows]))
        with pytest.raises(DataError, match="anchor record 1 holds the old answer of forget record 1"):
            METHODS["tool_delete"](model, task, given)
