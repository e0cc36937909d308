"""Reports that can be held to account: what they are about by digest, their seal, and the reader that holds a file, a patch and a model to them."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import digits, original, retrained

import expunge
from expunge.cli import app as cli
from expunge.core.digest import model_digest
from expunge.core.edits import Replace
from expunge.core.errors import ReportError
from expunge.core.patch import Patch, difference
from expunge.engine.run import Attempt
from expunge.modalities.files import models
from expunge.parts import seal
from expunge.planning import identity as about
from expunge.planning.outcome import audited, patched
from expunge.report import html, table


def sealed(document: dict, key: bytes | None = None) -> str:
    return json.dumps({**document, **seal.seal(document, key)})


SMALL = {"title": "t", "identity": {"patch": "ab" * 32}, "verdict": {"passed": True}, "n": 1.0, "text": "é\n\ud800", "none": None}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "report.json"

    def write(content: str | bytes):
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return write


# ---- the seal -----------------------------------------------------------------------------------------------------------------------------------------------


def test_the_seal_by_hand():
    """SHA-256 over sorted, tight, ASCII JSON of everything else; HMAC-SHA256 over that digest."""
    document = {"b": 2.5, "a": ["é", None, True], "sha256": "old", "hmac": "old"}
    digest = hashlib.sha256(b'{"a":["\\u00e9",null,true],"b":2.5}').hexdigest()
    assert seal.seal(document) == {"sha256": digest}
    assert seal.seal(document, b"k") == {"sha256": digest, "hmac": hmac.new(b"k", digest.encode(), hashlib.sha256).hexdigest()}


def test_any_layout_of_the_same_values_is_read(file):
    one = json.loads(sealed(SMALL, b"k"))
    for text in (json.dumps(one), json.dumps(one, indent=3), json.dumps(one, sort_keys=True), json.dumps(dict(reversed(one.items()))), table.dump(one)):
        assert seal.read(file(text)) == seal.read(file(text), b"k") == one


@settings(deadline=None, max_examples=50)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=12))
def test_whatever_a_report_holds_is_sealed_and_read(tmp_path_factory, value):
    path = table.write({**(document := {"identity": {}, "x": value}), **seal.seal(document)}, tmp_path_factory.getbasetemp() / "any.json")
    assert seal.read(path)["x"] == table.strict(value)


def test_every_changed_byte_is_refused_or_changes_nothing(file):
    """A byte may change in the layout (a space to a tab, an escape in capitals); never a value, a name or the seal."""
    good = json.dumps(json.loads(sealed(SMALL, b"k"))).encode()
    wanted = seal.read(file(good), b"k")
    for position in range(len(good)):
        for bit in (0, 3, 5):
            raw = bytearray(good)
            raw[position] ^= 1 << bit
            try:
                found = seal.read(file(bytes(raw)), b"k")
            except ReportError as error:
                assert str(error).isprintable()
            else:
                assert found == wanted


def test_every_cut_is_refused(file):
    good = sealed(SMALL).encode()
    for length in range(len(good)):
        with pytest.raises(ReportError, match=r"report.json is no JSON, or was cut off: "):
            seal.read(file(good[:length]))
    with pytest.raises(ReportError, match="Extra data"):
        seal.read(file(good + b"{}"))


WHOLE = sealed(SMALL)
FOREIGN = {
    "empty": (b"", "no JSON, or was cut off"),
    "not utf-8": (b"\xff\xfe{}", "no JSON, or was cut off: 'utf-8' codec can't decode"),
    "another encoding": (WHOLE.encode("utf-16"), "no JSON, or was cut off"),
    "a list": (b"[]", "is JSON but no sealed report of expunge: it lacks identity or sha256"),
    "no seal": (json.dumps(SMALL).encode(), "is JSON but no sealed report"),
    "no identity": (sealed({"title": "t"}).encode(), "is JSON but no sealed report"),
    "identity is a text": (sealed({"identity": "t"}).encode(), "is JSON but no sealed report"),
    "a seal that is none": (json.dumps({**SMALL, "sha256": "é" * 64}).encode(), "is JSON but no sealed report"),
    "a seal that is a number": (json.dumps({**SMALL, "sha256": 1}).encode(), "is JSON but no sealed report"),
    "a name twice": (WHOLE.replace('"title": "t"', '"title": "t", "title": "t"').encode(), "'title' stands twice in one object"),
    "a name twice, with codes": (b'{"\\u001b[31m": 1, "\\u001b[31m": 1}', r"'\\x1b\[31m' stands twice"),
    "nan": (b'{"a": NaN}', "NaN is no number of JSON"),
    "minus infinity": (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
    "beyond all numbers": (WHOLE.replace('"n": 1.0', '"n": 1e999').encode(), "was changed after it was written"),
    "a million digits": (b'{"a": ' + b"1" * 1_000_000 + b"}", "no JSON, or was cut off"),
    "deep": (b"[" * 100_000, "no JSON, or was cut off"),
    "deep and whole": (b"[" * 100_000 + b"]" * 100_000, "no JSON, or was cut off"),
    "as deep as can be parsed": (WHOLE.replace('"n": 1.0', '"n": ' + "[" * 600 + "]" * 600).encode(), "was changed after it was written"),
    "another value": (WHOLE.replace('"passed": true', '"passed": false').encode(), "was changed after it was written: its content does not match its seal"),
    "one more value": (WHOLE.replace('"title": "t"', '"title": "t", "more": 0').encode(), "was changed after it was written"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_and_changed_files(file, content, message):
    with pytest.raises(ReportError, match=message) as error:
        seal.read(file(content))
    assert str(error.value).isprintable() and str(error.value).startswith("report.json ")


def test_keys(file):
    plain, signed = sealed(SMALL), sealed(SMALL, b"k")
    assert "hmac" not in seal.read(file(plain)) and seal.read(file(signed))["hmac"]
    odd = json.dumps({**json.loads(signed), "hmac": "é"})
    for text, key in ((plain, b"k"), (signed, b"other"), (odd, b"k")):
        with pytest.raises(ReportError, match=r"report\.json is not signed by this key"):
            seal.read(file(text), key)
    forged = {**SMALL, "verdict": {"passed": False}, "hmac": json.loads(signed)["hmac"]}
    with pytest.raises(ReportError, match="not signed by this key"):
        seal.read(file(json.dumps({**forged, **seal.seal(forged)})), b"k")


def test_files_that_are_none(tmp_path, monkeypatch, file):
    with pytest.raises(ReportError, match=r"cannot read nowhere\.json: No such file"):
        seal.read(tmp_path / "nowhere.json")
    with pytest.raises(ReportError, match="is no file"):
        seal.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReportError, match="pipe is no file"):
        seal.read(tmp_path / "pipe")
    odd = tmp_path / "a\x1b[31m\nb"
    odd.write_text("{")
    with pytest.raises(ReportError, match=r"^a\\x1b\[31m\\nb is no JSON"):
        seal.read(odd)
    monkeypatch.setattr(seal, "MAX_BYTES", 10)
    with pytest.raises(ReportError, match=r"report\.json is larger than 10 bytes"):
        seal.read(file(WHOLE))


# ---- what a report is about ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdict():
    """A patch that retrains digits without a class, audited with one reference."""
    model, task, split = digits("class")
    patch = difference(dict(model.named_parameters()), dict(retrained("digits", "class", 1).named_parameters())).stamped(model, method="salun", seed=3)
    attempt = Attempt("salun", {}, 3, "ok", "", patch)
    return audited(model, patched(model, attempt), task, split, references=[retrained("digits", "class", 0)], slow=False, attempt=attempt,
                   rules={"accuracy.forget": "<= 0.1"})  # fmt: skip


def test_a_report_says_what_it_is_about(verdict):
    p, known = verdict.probe, verdict.document(pictures=False)["identity"]
    assert known["patch"] == verdict.tries[0].attempt.patch.digest
    assert known["before"] == model_digest(p.before) and known["after"] == model_digest(p.after) != known["before"]
    assert known["references"] == [model_digest(p.references[0])]
    assert {n: part["n"] for n, part in known["parts"].items()} == {n: len(part) for n, part in p.split.parts().items()}
    for name, part in p.split.parts().items():
        assert len(known["parts"][name]["digest"]) == 64 and known["parts"][name]["digest"].startswith(part.digest)
    assert known["rules"] == {"accuracy.forget": "<= 0.1"} and known["seed"] == 0
    assert (known["code"]["expunge"], known["code"]["torch"]) == (expunge.__version__, torch.__version__)
    other = replace(verdict, probe=replace(p, split=replace(p.split, forget=p.split.forget.take(range(10)), test=list(p.split.test)), cache={}))
    found = about.identity(other.probe, {}, None, None)
    assert found["parts"]["forget"] != known["parts"]["forget"] and found["parts"]["retain"] == known["parts"]["retain"]
    assert found["parts"]["test"] == {"n": len(p.split.test), "digest": None} and found["patch"] is found["after"] is None


@pytest.mark.parametrize("good", [True, False])
def test_a_model_that_was_handed_in_is_the_one_after(good):
    """Weights from another tool have no patch: digests, sections and pictures are of these weights, passed or not."""
    model, task, split = digits("class")
    after = retrained("digits", "class", 1)
    done = audited(model, after, task, split, slow=False, rules={"accuracy.forget": "<= 0.1" if good else ">= 0.9"})
    document = done.document()
    assert done.passed == good and document["identity"]["after"] == model_digest(after) and document["identity"]["patch"] is None
    assert document["sections"] and document["pictures"]["loss"]["forget"]["after"] != document["pictures"]["loss"]["forget"]["before"]


def test_a_changed_install_shows(tmp_path):
    """Any file of code or page, its name and its content; nothing else."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("x = 1\n")
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "room" / "notes.txt").write_text("")
    found = [about.source.__wrapped__(tmp_path)]
    (tmp_path / "room" / "notes.txt").write_text("more")
    assert about.source.__wrapped__(tmp_path) == found[0]
    for change in (lambda: (tmp_path / "room" / "a.py").write_text("x = 2\n"), lambda: (tmp_path / "room" / "a.py").rename(tmp_path / "room" / "b.py"),
                   lambda: (tmp_path / "page.html").write_text("<b>"), lambda: (tmp_path / "b.py").write_text("")):  # fmt: skip
        change()
        found.append(about.source.__wrapped__(tmp_path))
    assert len(set(found)) == len(found) and about.code()["source"] == about.source(about.Path(expunge.__file__).parent)


def test_the_page_ends_with_the_digests(verdict):
    document = verdict.document(pictures=False)
    page = html.render({**document, **seal.seal(document, b"k")})
    tail = page[page.index("What this report is about") :]
    known = document["identity"]
    for digest in (known["patch"], known["before"], known["after"], *known["references"], known["code"]["source"], *seal.seal(document, b"k").values()):
        assert f"{digest}" in tail
    assert all(part["digest"] in tail for part in known["parts"].values()) and len(tail) < 6000
    assert "What this report is about" not in html.render({k: v for k, v in document.items() if k != "identity"})


def test_saved_files_are_sealed_and_signed(verdict, tmp_path):
    document = verdict.save(tmp_path, key=b"k")
    found = seal.read(tmp_path / "report.json", b"k")
    assert found["sha256"] == document["sha256"] in (tmp_path / "report.html").read_text()
    assert found["chosen"]["patch"] == "patch.safetensors" and Patch.load(tmp_path / "patch.safetensors", b"k").digest == found["identity"]["patch"]
    document["title"] = "another"
    again = verdict.save(tmp_path, document=document)
    assert "hmac" not in again and seal.read(tmp_path / "report.json")["title"] == "another"


def test_patch_and_models_are_held_to_a_report(verdict):
    document, p = verdict.document(pictures=False), verdict.probe
    patch = verdict.tries[0].attempt.patch
    before = lambda: digits("class")[0]  # noqa: E731
    told = lambda *given: [(h.what, h.match) for h in about.compared(document, *given)]  # noqa: E731
    assert told(patch) == [("patch", True)]
    assert told(patch, before()) == [("patch", True), ("model", True), ("model with the patch", True)]
    assert told(None, before(), p.after) == [("model", True), ("model after", True)] and told(patch, p.after) == [("patch", True), ("model", True)]
    wrong = Patch((Replace(patch.edits[0].name, patch.edits[0].values + 1, patch.edits[0].mask), *patch.edits[1:]))
    assert told(wrong) == [("patch", False)] and told(wrong, before()) == [("patch", False), ("model", True)]
    assert told(None, p.references[0], p.before) == [("model", False), ("model after", False)]
    said = about.compared(document, None, p.references[0])[0].said
    assert (
        said.startswith(f"differs: it is {model_digest(p.references[0])}") and document["identity"]["before"] in said and document["identity"]["after"] in said
    )
    assert told() == [] and [h.match for h in about.compared({"identity": {"patch": None}}, patch)] == [False]


# ---- the command --------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch, verdict):
    """A folder with the report, its patch, the weights before, after and of another model, and keys."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text("from expunge.modalities.nets import small_cnn\ndef build():\n    return small_cnn(8)\n")
    for name, model in (("before", original("digits")), ("after", verdict.probe.after), ("other", verdict.probe.references[0])):
        models.save_state(model, f"{name}.safetensors")
    for name in ("key", "bad"):
        (tmp_path / name).write_text(name)
    verdict.save("out", "Audit of a patch", b"key")
    yield tmp_path
    sys.modules.pop("mynet", None)


def check(capsys, monkeypatch, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `expunge audit --check WORDS`."""
    monkeypatch.setattr(sys, "argv", ["expunge", "audit", "--check", *words])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("ignore")
        cli.main()
    return int(end.value.code or 0), *capsys.readouterr()


NET = ("--model", "py:mynet:build", "--weights")


def test_a_report_is_read_back(home, capsys, monkeypatch, verdict):
    code, out, err = check(capsys, monkeypatch, "out/report.json", "--key-file", "key", "--patch", "out/patch.safetensors", *NET, "before.safetensors")
    known = verdict.document(pictures=False)["identity"]
    assert (code, err) == (0, "")
    digests = (known["patch"], known["before"], known["after"], known["parts"]["retain"]["digest"])
    for said in ("the seal is whole; signed by this key", "class:3", "passed", *digests, "the same as here", "the report's before", "the report's after"):
        assert said in out
    code, out, _ = check(capsys, monkeypatch, "out/report.json", "--json", *NET, "before.safetensors", "--after", "after.safetensors")
    found = json.loads(out)
    assert code == 0 and found["identity"] == json.loads(table.dump(known)) and found["signed"].startswith("signed; --key-file")
    assert [(h["what"], h["match"]) for h in found["held"]] == [("model", True), ("model after", True)]
    code, out, _ = check(capsys, monkeypatch, "out/report.json", *NET[:2], "--after", "after.safetensors")
    assert code == 0 and re.search(r"^model after +match", out, re.MULTILINE) and not re.search(r"^model  +(match|differs)", out, re.MULTILINE)


REFUSED = [
    (("out/report.json", *NET, "other.safetensors"), "report.json is about another model: see which digest differs"),
    (("out/report.json", *NET, "before.safetensors", "--after", "before.safetensors"), "about another model after"),
    (("out/report.json", "--patch", "other.patch"), "about another patch"),
    (("out/report.json", "--key-file", "bad"), "report.json is not signed by this key"),
    (("changed.json",), "changed.json was changed after it was written"),
    (("cut.json",), "cut.json is no JSON, or was cut off"),
    (("out/patch.safetensors",), "patch.safetensors is no JSON"),
    (("odd.json", *NET, "before.safetensors"), "no task"),
    (("out/report.json", "--forget", "class:3"), "--check reads a report back and audits nothing"),
    (("out/report.json", "--out", "x"), "--check reads a report back and audits nothing"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_differs_is_exit_code_2(home, capsys, monkeypatch, verdict, words, message):
    text = (home / "out" / "report.json").read_text()
    (home / "changed.json").write_text(text.replace('"passed": true', '"passed": false', 1))
    (home / "cut.json").write_text(text[:-100])
    (home / "odd.json").write_text(sealed({"identity": {}, "task": "\x1b[31m"}))
    Patch(verdict.tries[0].attempt.patch.edits[:1]).save("other.patch")
    code, out, err = check(capsys, monkeypatch, *words)
    assert code == 2 and message in err and err.startswith("expunge: ") and len(err.splitlines()) == 1 and err.strip().isprintable()
    if "another" in message:
        assert "differs: it is" in out
        assert not all(h["match"] for h in json.loads(check(capsys, monkeypatch, *words, "--json")[1])["held"])


def test_a_forged_report_prints_no_codes(home, capsys, monkeypatch):
    """Whoever seals a report of their own writes no escape codes on the terminal of who reads it."""
    nasty = "\x1b[2J\n"
    parts = {nasty: {"n": nasty, "digest": nasty}}
    known = {"patch": nasty, "parts": parts, "references": [nasty], "rules": {nasty: nasty}, "seed": nasty, "code": {nasty: nasty}}
    (home / "own.json").write_text(sealed({"identity": known, "title": nasty, "asked": nasty, "verdict": {"reasons": [nasty]}}))
    code, out, _ = check(capsys, monkeypatch, "own.json")
    assert code == 0 and "\x1b" not in out and all(line.isprintable() for line in out.splitlines()) and "another than here" in out


def test_an_audit_needs_a_model(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["expunge", "audit", "--forget", "class:3", "--patch", "p"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "the model is missing" in capsys.readouterr().err


def test_json_on_standard_output_is_sealed_too(verdict, capsys, file):
    """What `--json` prints is the report without its pictures, under a seal of its own."""
    from expunge.cli.shown import show

    document = verdict.document()
    show({**document, **seal.seal(document, b"k")}, True)
    found = seal.read(file(capsys.readouterr().out))
    assert found["identity"]["patch"] and "pictures" not in found and "hmac" not in found
