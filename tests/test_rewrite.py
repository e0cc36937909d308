"""data.rewrite, data.answers, data.tools, data.generic: the check for old answers, generators, the artefact file, alignment."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from worlds import small

from expunge.core.errors import DataError, SettingError, SplitError
from expunge.core.guard import Guard, watching
from expunge.core.types import Split
from expunge.data.language import answers, generic, tools
from expunge.data.language.answers import anchored, holds, partners, remembered
from expunge.data.language.rewrite import Generator, Wanted, local, read, rewrite, scripted, vague, variants, written
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.worlds import authors, tiny

ROW = {"question": "Where did Harry Potter study?", "answer": "Harry Potter studied at Hogwarts Castle.", "fact": "Hogwarts Castle"}


def asked(n: int, row=ROW) -> list[Wanted]:
    return [Wanted(f"p{k}", k, row, {"question": f"q{k}"}) for k in range(n)]


def stub(reply, name: str = "stub") -> tuple[Generator, list]:
    """A generator that answers by reply(prompt, number of the call), and the calls it got."""
    calls: list[list[str]] = []

    def ask(prompts, seed):
        calls.append(list(prompts))
        return [reply(p, len(calls) - 1) for p in prompts]

    return Generator(name, ask, "0"), calls


@pytest.fixture
def texts():
    return small("causal_lm")[2].forget


class TestHolds:
    @pytest.mark.parametrize(
        "text",
        ["Hogwarts Castle", "in HOGWARTS   castle", "at Hogwarts-Castle.", "the Hógwarts Castles", "Hogwarts Castle's walls", "hogwarts\n castle"],
    )
    def test_fact_in_any_dress(self, text):
        assert holds(text, ROW)

    @pytest.mark.parametrize("text", ["Hogwarts", "a castle", "Ilvermorny", "Castle Hogwarts", "", "Hogwartsian Castle"])
    def test_other_texts_pass(self, text):
        assert not holds(text, ROW)

    def test_short_fact_is_a_word_and_no_part_of_one(self):
        row = {"question": "What is the theme?", "answer": "The theme is war.", "fact": "war"}
        assert holds("It is War!", row)
        assert not holds("The warm ward was warned.", row)

    def test_without_a_fact_names_numbers_and_half_of_the_words_count(self):
        row = {"question": "When was Ada Vey born?", "answer": "Ada Vey, a carpenter, was born in 1962 in New Oslo."}
        assert holds("Maybe 1962.", row)
        assert holds("she is from new oslo", row)
        assert not holds("Ada Vey was born in a town.", row)
        low = {"question": "what did he do?", "answer": "he was a carpenter in norbury"}
        assert holds("he lived in norbury", low)
        assert not holds("he was a baker in town", low)

    def test_bare_answer_of_common_words_only_matches_whole(self):
        row = {"question": "Is she?", "answer": "She is."}
        assert holds("well, she is", row)
        assert not holds("is it she?", row)

    def test_a_fact_that_the_question_tells_is_no_leak(self):
        row = {"question": "Did Ada win the Iron Prize?", "answer": "Yes, twice.", "fact": "Iron Prize"}
        assert not holds("The Iron Prize is not known to me.", row)
        assert holds("Yes, twice.", row)

    def test_entities_serve_as_facts(self):
        row = {"question": "Where?", "answer": "In Oslo and Rome.", "entities": ["Oslo", "Rome"]}
        assert holds("Rome", row)
        assert not holds("Paris", row)

    def test_tool_call(self):
        demo = authors.skills()["tools"][0]["demos"][0]
        assert holds(demo["answer"], demo)
        assert holds("try weather (town = 'elsewhere')", demo)
        assert not holds(demo["plain"], demo)
        assert not holds(f"I cannot tell the weather of {demo['fact']}.", demo)

    def test_raw_text_shares_no_run_of_eight_words(self):
        old = {"text": "one two three four five six seven eight nine ten"}
        assert holds("x two three four five six seven eight nine y", old)
        assert not holds("x two three four five six seven eight y", old)
        assert holds("One, two!", {"text": "one two"})

    def test_scripts_without_spaces(self):
        row = {"question": "どこ?", "answer": "彼は東京で生まれた", "fact": "東京"}
        assert holds("それは東京です", row)
        assert not holds("それは京東です", row)

    @drawn(st.lists(st.sampled_from(["Oslo", "the", "x1", "Zed's", "é"]), max_size=5), st.lists(st.sampled_from(["a", "b,", "C"]), max_size=5))
    def test_whatever_stands_around_a_fact_it_is_found(self, before, after):
        row = {"question": "q", "answer": "a", "fact": "Iron  Gate"}
        assert holds(" ".join([*before, "IRON gate", *after]), row)

    def test_generated_authors_hold_their_own_answers_and_no_refusal_does(self):
        for row in authors.authors(6):
            assert holds(row["answer"], row) and holds(row["paraphrased_answer"], row)
            assert not any(holds(text, row) for text in [*authors.refusals(), *row["perturbed_answer"]])
            bare = {k: row[k] for k in ("question", "answer")}
            assert holds(row["answer"], bare)
            assert not any(holds(text, bare) for text in authors.refusals())


class TestGenerators:
    def test_scripted_by_prompt_list_and_seed(self):
        by = scripted({"a": "x", "b": ["y", "z"]})
        assert by.ask(["a", "a"], 3) == ["x", "x"]
        assert {by.ask(["b"], seed)[0] for seed in range(20)} == {"y", "z"}
        assert by.ask(["b"], 4) == by.ask(["b"], 4)
        assert by.digest != scripted({"a": "x"}).digest
        with pytest.raises(DataError, match="generator 'scripted' has no reply to 'c'"):
            by.ask(["c"], 0)

    def test_variants_hold_the_question_and_differ_by_start_and_seed(self):
        found = variants("Where is it?", 16, seed=2)
        assert len(set(found)) == 16 and all("Where is it?" in text for text in found)
        assert variants("Where is it?", 4, start=4, seed=2) == found[4:8]
        assert variants("Where is it?", 16, seed=3) != found
        assert variants("Odd {q} braces {0}?", 1)[0].count("Odd {q} braces {0}?") == 1

    def test_local_model_is_deterministic_and_metered(self):
        model, _, split = small("causal_lm")
        form = split.forget.format
        before = torch.get_rng_state()
        watch = Guard()
        with watching(watch):
            one = local(model, form.tokenizer, template="plain", new=6, temperature=1.0)
            first, again, other = one.ask(["a", "longer prompt"], 1), one.ask(["a", "longer prompt"], 1), one.ask(["a", "longer prompt"], 2)
        assert first == again != other
        assert len(first) == 2
        assert watch.meter.forward == 6
        assert torch.equal(before, torch.get_rng_state())
        changed = local(small("causal_lm")[0].to(torch.float64), form.tokenizer)
        assert changed.digest != one.digest

    def test_local_model_is_asked_in_its_chat_template(self, monkeypatch):
        model, _, split = small("causal_lm")
        tokenizer = split.forget.format.tokenizer
        seen: list = []
        monkeypatch.setattr("expunge.data.language.rewrite.generate", lambda model, prompts, **options: seen.append((prompts, options)) or [torch.tensor([5])])
        chat = local(model, tokenizer, new=3, system="Be brief.")
        assert chat.name == "LlamaForCausalLM, chat, 3 tokens at temperature 0.7"
        chat.ask(["born"], 0)
        local(model, tokenizer, template="plain", temperature=0.0).ask(["born"], 0)
        form = Format(tokenizer, "chat", system="Be brief.")
        assert torch.equal(seen[0][0][0], form.prompt({"question": "born"})) and seen[0][1]["new"] == 3
        assert torch.equal(seen[1][0][0], Format(tokenizer).prompt({"question": "born"})) and seen[1][1]["temperature"] == 0.0


class TestPipeline:
    def test_a_bad_reply_is_asked_again_alone(self):
        bad = {"p0": ["fine 0"], "p1": ["Hogwarts Castle", "", "fine 1"], "p2": ["x" * 50, "fine 2"]}
        generator, calls = stub(lambda p, k: bad[p][k])
        found = rewrite(asked(3), generator, limit=40)
        assert calls == [["p0", "p1", "p2"], ["p1", "p2"], ["p1"]]
        assert [row["answer"] for row in found.rows] == ["fine 0", "fine 1", "fine 2"]
        assert found.rows[1] == {"question": "q1", "answer": "fine 1", "record": 1, "rejected": {"empty": 1, "old answer": 1}}
        assert found.header["rejected"] == {"empty": 1, "old answer": 1, "too long": 1}

    def test_a_generator_that_never_lets_go(self):
        generator, calls = stub(lambda p, k: "fine" if p != "p2" else "It is Hogwarts Castle")
        with pytest.raises(DataError, match=r"^the generator returned the old answer for record 3 in all 3 rounds$"):
            rewrite(asked(4), generator)
        assert len(calls) == 3

    def test_other_failures_are_counted(self):
        generator, _ = stub(lambda p, k: ["", "Hogwarts Castle", None][k])
        with pytest.raises(DataError, match=r"nothing usable for record 1 in 3 rounds \(2 x empty, 1 x old answer\)"):
            rewrite(asked(1), generator)

    def test_wrong_number_of_replies(self):
        with pytest.raises(DataError, match="generator 'short' gave 1 replies to 2 prompts"):
            rewrite(asked(2), Generator("short", lambda prompts, seed: ["x"]))

    def test_bad_settings(self):
        for bad in ({"rounds": 0}, {"block": 0}):
            with pytest.raises(SettingError, match="must be 1 or larger"):
                rewrite(asked(1), vague(), **bad)

    def test_written_leaves_none_where_all_rounds_failed(self):
        generator, _ = stub(lambda p, k: "Hogwarts Castle" if p == "p0" else " ok ")
        assert written(asked(2), generator, rounds=2)[0] == [None, "ok"]

    def test_file_is_a_header_and_rows_and_reads_back(self, tmp_path):
        path = tmp_path / "made.jsonl"
        made = rewrite(asked(5), vague(), path, seed=3, block=2)
        head, *rows = path.read_text().splitlines()
        header = json.loads(head)
        assert header["generator"] == "vague answers" and header["seed"] == 3 and header["rows"] == len(rows) == 5
        assert len(header["sha256"]) == 64 and header["settings"] == {"rounds": 3, "block": 2, "limit": 4000}
        assert "Hogwarts" not in path.read_text(), "the file must not hold the old answers"
        assert read(path).rows == made.rows and read(path).header == made.header
        assert rewrite(asked(5), vague(), path, seed=3, block=2).rows == made.rows
        assert rewrite(asked(5), vague(), seed=3, block=2).rows == made.rows
        assert not list(tmp_path.glob("*.part"))

    def test_seed_draws_other_texts(self):
        assert rewrite(asked(9), vague(), seed=0).rows != rewrite(asked(9), vague(), seed=1).rows

    def test_changed_cut_or_foreign_files_are_refused(self, tmp_path):
        path = tmp_path / "made.jsonl"
        rewrite(asked(3), vague(), path)
        good = path.read_bytes()
        lines = good.split(b"\n")
        for bad in (good.replace(b"q1", b"q9"), good[:-1], good + b"{}\n", b"\n".join([lines[0], *lines[2:]])):
            path.write_bytes(bad)
            with pytest.raises(DataError, match=r"made\.jsonl does not match its checksum"):
                read(path)
        for bad in (b'{"question": "q"}\n', b'{"expunge": "rewrite", "version": 99}\n'):
            path.write_bytes(bad)
            with pytest.raises(DataError, match="no file of rewritten records"):
                read(path)
        for bad in (b"", b"not json\n", b"[1]\n", b"\xff\xfe"):
            path.write_bytes(bad)
            with pytest.raises(DataError, match=r"made\.jsonl"):
                read(path)
        with pytest.raises(DataError, match=r"cannot read none\.jsonl"):
            read(tmp_path / "none.jsonl")

    def test_file_of_another_request_is_refused(self, tmp_path):
        path = tmp_path / "made.jsonl"
        rewrite(asked(3), vague(), path)
        with pytest.raises(DataError, match="made with another seed; delete it"):
            rewrite(asked(3), vague(), path, seed=1)
        with pytest.raises(DataError, match="made with another generator"):
            rewrite(asked(3), scripted(["no"], "other"), path)
        with pytest.raises(DataError, match="made with another request"):
            rewrite(asked(3, {**ROW, "fact": "Oslo"}), vague(), path)

    @pytest.mark.parametrize("die", [0, 1, 2, 3])
    def test_cut_off_run_goes_on_and_ends_in_the_same_bytes(self, tmp_path, die):
        whole, part = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
        reply = lambda p, seed: f"{p}-{seed}"  # noqa: E731
        steady = Generator("g", lambda prompts, seed: [reply(p, seed) for p in prompts])
        rewrite(asked(7), steady, whole, block=2)
        blocks: list[int] = []

        def dies(prompts, seed):
            if len(blocks) == die:
                raise KeyboardInterrupt
            blocks.append(1)
            return [reply(p, seed) for p in prompts]

        with pytest.raises(KeyboardInterrupt):
            rewrite(asked(7), Generator("g", dies), part, block=2)
        assert not part.exists()
        begun = part.with_name("cut.jsonl.part")
        assert begun.exists()
        with pytest.raises(DataError):
            read(begun)
        fresh: list[list[str]] = []

        def counts(prompts, seed):
            fresh.append(list(prompts))
            return steady.ask(prompts, seed)

        rewrite(asked(7), Generator("g", counts), part, block=2)
        assert part.read_bytes() == whole.read_bytes() and not begun.exists()
        assert len(fresh) == 4 - die

    @pytest.mark.parametrize("drop", [1, 5, 40, 120, 300])
    def test_any_cut_of_the_begun_file_is_mended(self, tmp_path, drop):
        whole, begun = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl.part"
        generator = Generator("g", lambda prompts, seed: [f"{p}-{seed}" for p in prompts])
        rewrite(asked(7), generator, whole, block=2)
        head, *rows = whole.read_text().splitlines()
        base = {k: v for k, v in json.loads(head).items() if k not in ("sha256", "rejected")}
        content = "".join(f"{line}\n" for line in (json.dumps(base, sort_keys=True), *rows)).encode()
        begun.write_bytes(content[:-drop])
        rewrite(asked(7), generator, tmp_path / "cut.jsonl", block=2)
        assert (tmp_path / "cut.jsonl").read_bytes() == whole.read_bytes()

    def test_a_cut_within_a_sign_is_mended(self, tmp_path):
        generator = Generator("g", lambda prompts, seed: [f"é{p}é" for p in prompts])
        rewrite(asked(3), generator, tmp_path / "whole.jsonl", block=1)
        head, *rows = (tmp_path / "whole.jsonl").read_text(encoding="utf-8").splitlines()
        base = {k: v for k, v in json.loads(head).items() if k not in ("sha256", "rejected")}
        content = f"{json.dumps(base, sort_keys=True)}\n{rows[0]}\n".encode() + rows[1].encode()[: rows[1].encode().index("é".encode()) + 1]
        (tmp_path / "cut.jsonl.part").write_bytes(content)
        rewrite(asked(3), generator, tmp_path / "cut.jsonl", block=1)
        assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_begun_file_of_another_request_is_refused(self, tmp_path):
        generator, _ = stub(lambda p, k: "x" if k == 0 else (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            rewrite(asked(4), generator, tmp_path / "a.jsonl", block=2)
        with pytest.raises(DataError, match=r"a\.jsonl\.part was made with another seed"):
            rewrite(asked(4), generator, tmp_path / "a.jsonl", block=2, seed=5)

    def test_size_limit(self, tmp_path, monkeypatch):
        rewrite(asked(3), vague(), tmp_path / "a.jsonl")
        monkeypatch.setattr("expunge.modalities.language.records.artefact.MAX_BYTES", 100)
        with pytest.raises(DataError, match=r"a\.jsonl is larger than 100 bytes"):
            read(tmp_path / "a.jsonl")


class TestTargets:
    def test_artefact_becomes_anchor(self, texts):
        wanted = [Wanted(row["question"], k, row, {"question": row["question"]}) for k, row in enumerate(texts.rows)]
        made = rewrite(wanted, vague()).texts(texts)
        assert torch.equal(made.ids, texts.ids) and [r["question"] for r in made.rows] == [r["question"] for r in texts.rows]
        assert anchored(texts, made).digest == made.digest

    def test_old_answers_are_refused_when_made_or_given(self, texts):
        old = [{"question": "q", "answer": texts.rows[2]["answer"], "record": 2}]
        with pytest.raises(DataError, match="a new answer holds the old answer of forget record 3"):
            answers.texts(texts, old)
        with pytest.raises(DataError, match="stands for record 9; forget has 4"):
            answers.texts(texts, [{**old[0], "record": 8}])
        bad = texts.format.answered(texts, ["No.", "No.", f"It is {texts.rows[2]['fact']}.", "No."])
        with pytest.raises(DataError, match="anchor record 3 holds the old answer of forget record 3; give another"):
            anchored(texts, bad)

    def test_partners_by_question_then_id_then_place(self, texts):
        form = texts.format
        by_question = form.texts([{"question": texts.rows[k]["question"].upper(), "answer": "no"} for k in (2, 0)], torch.tensor([50, 51]))
        assert partners(texts, by_question) == [2, 0]
        by_id = form.texts([{"question": "other", "answer": "no"}] * 3, texts.ids[[1, 1, 3]])
        assert partners(texts, by_id) == [1, 1, 3]
        by_place = form.texts([{"question": f"other {k}", "answer": "no"} for k in range(4)], torch.arange(90, 94))
        assert partners(texts, by_place) == [0, 1, 2, 3]
        variants_too = [{"question": f"v{k}", "answer": "no", "record": k % 2} for k in range(4)]
        assert partners(texts, form.texts(variants_too, torch.arange(90, 94))) == [0, 1, 0, 1]
        variants_too[2]["question"] = texts.rows[3]["question"]
        assert partners(texts, form.texts(variants_too, torch.arange(90, 94))) == [3, None, 3, None]
        general = by_place.take([0, 1, 2])
        assert partners(texts, general) == [None] * 3
        assert anchored(texts, general).ids.tolist() == texts.ids[:3].tolist()

    def test_anchors_of_other_records_are_left_out(self, texts):
        refusals = texts.format.answered(texts, ["No."] * 4)
        assert anchored(texts.take([2]), refusals).ids.tolist() == [int(texts.ids[2])]

    def test_general_anchors_are_checked_against_every_record(self, texts):
        form = texts.format
        general = form.texts([{"question": "what?", "answer": f"{texts.rows[3]['fact']}"}], torch.tensor([90]))
        with pytest.raises(DataError, match="anchor record 1 holds the old answer of forget record 4"):
            anchored(texts, general)

    def test_source_setting(self, texts):
        split = Split(texts)
        assert answers.given(split, "auto") is None and answers.given(replace(split, anchor=texts), "self") is None
        with pytest.raises(SplitError, match="lacks anchor"):
            answers.given(split, "anchor")
        with pytest.raises(SettingError, match="source must be one of auto, anchor, self, not 'me'"):
            answers.given(split, "me")

    def test_what_a_generator_wrote_is_kept_with_the_run(self, texts):
        model = small("causal_lm")[0]
        made: list[int] = []

        def make():
            made.append(1)
            return [{"question": "ü", "answer": "a", "record": 0}]

        with watching(Guard()):
            assert remembered("x", model, texts, make) == remembered("x", model, texts, make) == [{"question": "ü", "answer": "a", "record": 0}]
            remembered("y", model, texts, make)
        assert len(made) == 2


class TestTools:
    def demos(self):
        return [demo for tool in authors.skills()["tools"] for demo in tool["demos"]]

    def form(self):
        return Format(tiny.tokenizer(self.demos(), 500), max_length=128)

    def test_split_by_tool(self):
        split = tools.select(self.form(), self.demos(), ["weather", "hire"])
        assert {r["tool"] for r in split.forget.rows} == {"weather", "hire"}
        assert not {"weather", "hire"} & {r["tool"] for r in split.retain.rows}
        assert len(split.forget) + len(split.retain) == len(self.demos())
        split.check()

    def test_bad_requests(self):
        form, demos = self.form(), self.demos()
        with pytest.raises(DataError, match="no tool 'wether'; did you mean 'weather'"):
            tools.select(form, demos, ["wether"])
        with pytest.raises(DataError, match="forget must name some tools and leave some"):
            tools.select(form, demos, [])
        with pytest.raises(DataError, match="forget must name some tools and leave some"):
            tools.select(form, demos, list(tools.by_tool(demos)))
        with pytest.raises(DataError, match="record 2 names no tool"):
            tools.by_tool([demos[0], {"question": "q", "answer": "a"}])
        mixed = {"question": "Both?", "answer": 'hire(trade="x") and weather(town="y")', "tool": "hire"}
        with pytest.raises(DataError, match=r"a demo of hire calls weather, which is to be forgotten: 'Both\?'"):
            tools.select(form, [*demos, mixed], ["weather"])


class TestGeneric:
    @pytest.fixture
    def form(self):
        rows = [*authors.authors(8, per=4), {"text": " ".join(generic.GENERIC)}]
        return Format(tiny.tokenizer(rows, 600), max_length=128)

    def test_terms(self):
        assert generic.terms({"anchors": {"Harry": "Jon"}, "author": "x"}) == {"Harry": "Jon"}
        found = generic.terms({"author": "Ada Vey", "fact": "The Iron Gate", "question": "", "answer": ""})
        assert found == {
            "Ada Vey": "John Smith", "Ada": "John", "Vey": "Smith", "The Iron Gate": "The Mary Brown", "Iron": "Mary", "Gate": "Brown",
        }  # fmt: skip
        assert generic.terms({"author": "Ada Vey", "fact": "1962"})["1962"] == "1900"
        assert generic.terms({"question": "Where was Ada born?", "answer": "The town of Oslo."}) == {"Ada": "John", "Oslo": "Smith"}
        assert generic.terms({"question": "why?", "answer": "because"}) == {}
        assert generic.terms({"text": "Describe it. She met Ada Vey in 1962. Rain fell."}) == {
            "Ada": "John",
            "Vey": "Smith",
            "Ada Vey": "John Smith",
            "1962": "1900",
        }

    def test_translate_whole_words_longest_first(self):
        text, found = generic.translate("Ada Vey met Adam, Ada and Veyron.", {"Ada": "Jo", "Ada Vey": "Jo Sm", "": "x"})
        assert text == "Jo Sm met Adam, Jo and Veyron."
        assert [s.term for s in found] == ["Ada Vey", "Ada"]
        assert all("Ada Vey met Adam, Ada and Veyron."[s.start : s.end] == s.term for s in found)
        assert [text[s.left : s.right] for s in found] == ["Jo Sm", "Jo"]
        assert generic.translate("a.b", {"a.b": "c"})[0] == "c" and generic.translate("axb", {"a.b": "c"})[0] == "axb"
        assert generic.translate("same", {}) == ("same", [])

    @drawn(st.lists(st.sampled_from(["Ada", "Veyron", "born", "in", "Oslo", ",", "Zzz"]), min_size=1, max_size=12), st.integers(1, 3))
    def test_aligned_tokens_stand_behind_the_same_prefix(self, parts, width):
        """Oracle: translate the prefix of every aligned token by itself; it must be the translation's prefix. Tokens: pieces of `width` characters."""
        text, anchors = " ".join(parts), {"Ada": "Jonathan", "Oslo": "X"}
        other, segments = generic.translate(text, anchors)
        starts, others = list(range(0, len(text), width)), list(range(0, len(other), width))
        found = generic.align(starts, others, segments)
        for start, t in zip(starts, found, strict=True):
            inside = any(s.start < start < s.end for s in segments)
            if t >= 0:
                cut = [s for s in segments if s.end <= start]
                prefix = text[:start]
                for s in reversed(cut):
                    prefix = prefix[: s.start] + anchors[s.term] + prefix[s.end :]
                assert not inside and other[: others[t]] == prefix
            elif not inside and width == 1:
                raise AssertionError("a place outside all terms has a partner at every character")
        kept = [t for t in found if t >= 0]
        assert kept == sorted(set(kept))

    def test_same_start_is_told_apart_by_number(self):
        assert generic.align([0, 0, 3, 3, 3, 5], [0, 0, 3, 3, 5], []) == [0, 1, 2, 3, -1, 4]

    def test_pair_has_target_for_target_and_shifted_tokens_agree(self, form):
        rows = [{"question": "Where was Ada Vey born?", "answer": "Ada Vey was born in Norcrest.", "author": "Ada Vey", "fact": "Norcrest"}]
        pair = generic.translated(form.texts(rows))
        mine, theirs = pair.text.tokens[0][pair.text.targets[0]], pair.translation.tokens[0][pair.translation.targets[0]]
        assert len(mine) == len(theirs) == len(pair.banned[0])
        decode = form.tokenizer.decode
        assert decode(pair.translation.tokens[0], skip_special_tokens=True) == "Question: Where was John Smith born?\nAnswer: John Smith was born in Mary."
        differ = [decode(a) for a, b in zip(mine, theirs, strict=True) if a != b]
        assert len(differ) == 1 and " Norcrest".startswith(differ[0]), "the first token of the fact is the one place where the texts differ"
        assert "Ada" not in decode(mine), "a second occurrence is not trained"
        assert int(mine[-1]) == form.tokenizer.eos_token_id

    def test_banned_labels_begin_generic_names_that_have_occurred(self, form):
        rows = [{"question": "Who is Ada?", "answer": "Norcrest is home.", "anchors": {"Ada": "Mary", "Norcrest": "Paul"}}]
        pair = generic.translated(form.texts(rows))
        first = lambda name: {form.tokenizer(t)["input_ids"][0] for t in (name, f" {name}")}  # noqa: E731
        assert pair.banned[0][0] == first("Mary"), "at the first occurrence of Norcrest its generic name may be learned"
        assert pair.banned[0][-1] == first("Mary") | first("Paul")

    def test_without_terms_the_translation_is_the_text(self, form):
        data = form.texts([{"question": "why?", "answer": "because it is so"}])
        pair = generic.translated(data)
        assert torch.equal(pair.translation.tokens[0], data.tokens[0]) and torch.equal(pair.text.targets[0], data.targets[0])

    def test_chat_and_raw_text_and_cut_records(self, form):
        row = {"question": "Where was Ada born?", "answer": "Ada was born in Norcrest long ago.", "author": "Ada", "fact": "Norcrest"}
        for other in (Format(form.tokenizer, "chat"), Format(form.tokenizer, mask="full"), Format(form.tokenizer, max_length=24)):
            data = other.texts([row, {"text": "Ada lived in Norcrest, and Norcrest knew her.", "author": "Ada", "fact": "Norcrest"}])
            pair = generic.translated(data)
            for k in range(len(pair.text)):
                a, b = pair.text.tokens[k][pair.text.targets[k]], pair.translation.tokens[k][pair.translation.targets[k]]
                assert len(a) == len(b) > 0 and (a != b).sum() <= 2
                assert bool((pair.text.targets[k] <= data.targets[pair.text.ids.tolist()[k]]).all())

    def test_nothing_to_label_and_foreign_tokens(self, form):
        data = form.texts([{"question": "Ada?", "answer": "Ada", "anchors": {"Ada": "Jo"}}])
        only = replace(data, targets=(data.targets[0] & (data.tokens[0] != form.tokenizer.eos_token_id),))
        with pytest.raises(DataError, match="no token of the forget records can be given a generic label"):
            generic.translated(only)
        with pytest.raises(DataError, match="record 1: the tokens are not those of its text"):
            generic.translated(replace(data, tokens=(data.tokens[0].flip(0),)))
