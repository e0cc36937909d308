"""run.log and logging under `expunge`: what ended and when, in no words of the request."""

from __future__ import annotations

import logging
import threading

import pytest
from test_cli import FACTORY
from worlds import original, small

from expunge.cli.shown import bar
from expunge.core.errors import ModelError, SettingError
from expunge.engine import log
from expunge.engine import run as engine
from expunge.modalities.files import models, readers
from expunge.planning import recipe

SECRET = "ada-lovelace"


def lines(folder) -> list[str]:
    return (folder / log.NAME).read_text().splitlines()


def test_a_run_of_the_command_line_leaves_a_log_without_its_request(tmp_path, monkeypatch):
    """Names of folders, files, data and ids are the user's; none of them, and no value of a setting that is text, is in the log."""
    from expunge.cli.app import application

    home = tmp_path / SECRET
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    (home / "adanet.py").write_text(FACTORY)
    models.save_state(original("digits"), home / f"{SECRET}.safetensors")
    (home / f"{SECRET}.txt").write_text("\n".join(map(str, readers.load("world:digits/train", "classification").ids[:10].tolist())))
    words = ["forget", "--model", "py:adanet:build", "--weights", f"{SECRET}.safetensors", "--train", "world:digits/train", "--test", "world:digits/test"]
    code = application(["forget"])(
        [*words, "--forget", f"ids:@{SECRET}.txt", "--method", "gradient_ascent", "--epochs", "1", "--quick", "--out", SECRET], standalone_mode=False
    )
    found = lines(home / SECRET / "latest")
    assert not (home / SECRET / log.NAME).exists()
    assert code in (0, 1) and found[0].startswith("expunge ") and "torch" in found[0]
    said = "\n".join(found)
    assert "classification request: 10 forget" in said and "gradient_ascent: " in said and "audit: " in said and "verdict: " in said
    assert "epochs=1" in said and "lr=" in said
    for word in (SECRET, "adanet", str(tmp_path)):
        assert word not in said, word


def test_settings_that_are_text_are_left_out():
    assert log.told({"keep": 0.5, "soft": False, "concept": SECRET, "n": 3}) == "keep=0.5 soft=False concept=... n=3"


def test_messages_of_exceptions_and_reasons_are_not_logged(tmp_path, monkeypatch):
    model, task, split = small("classification")

    def broken(*_):
        raise RuntimeError(f"record {SECRET} is odd")

    monkeypatch.setattr(engine, "_judge", broken)
    with pytest.raises(RuntimeError, match=SECRET), log.kept(tmp_path):
        attempt = engine.unlearn("gradient_ascent", model, task, split, epochs=1)
        assert attempt.outcome == "failed" and SECRET in attempt.reason
        broken()
    assert "gradient_ascent: failed" in lines(tmp_path)[-2] and lines(tmp_path)[-1].endswith("ended by RuntimeError")
    assert SECRET not in (tmp_path / log.NAME).read_text()


def test_each_run_has_its_own_log_and_a_refused_one_touches_none(tmp_path):
    mine = logging.getLogger("expunge.test")
    for number in range(2):
        with log.kept(tmp_path):
            mine.info("run %d", number)
    assert len(lines(tmp_path)) == 2 and lines(tmp_path)[1].endswith("run 1")
    with pytest.raises(SettingError), log.kept(tmp_path):
        raise SettingError("no")
    with log.kept(tmp_path / "new"):
        pass
    assert lines(tmp_path)[1].endswith("run 1") and not (tmp_path / "new").exists()


def test_logging_is_as_it_was_after_a_run_and_threads_do_not_mix(tmp_path):
    logger = logging.getLogger("expunge")
    before = (logger.level, list(logger.handlers))
    with log.kept(tmp_path):
        other = threading.Thread(target=lambda: logger.info("of another run"))
        other.start()
        other.join()
        logger.debug("too fine")
        logger.info("mine")
    logger.info("after")
    assert (logger.level, list(logger.handlers)) == before
    assert [line.split(": ")[-1] for line in lines(tmp_path)[1:]] == ["mine"]


def test_a_log_that_cannot_be_written_is_warned_of_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot write run.log") as found, log.kept(tmp_path / "file"):
        for _ in range(3):
            logging.getLogger("expunge.test").info("x")
    assert len(found) == 1


def test_a_program_hears_runs_by_logging_alone(caplog):
    model, task, split = small("classification")
    with caplog.at_level("INFO", "expunge"):
        engine.unlearn("gradient_ascent", model, task, split, epochs=1)
    assert [r.name for r in caplog.records] == ["expunge.engine.run"] and "gradient_ascent: " in caplog.text


def test_the_bar_names_the_check_under_way(monkeypatch):
    from rich.progress import Progress

    shown = []
    monkeypatch.setattr(Progress, "update", lambda self, line, **given: shown.append(given["description"]))
    with bar(False):
        logging.getLogger("expunge.audits.core").debug("audit: %s", "known")
    assert shown == ["audit: known"]


def test_recipes_leave_a_log_where_their_results_go(tmp_path, monkeypatch):
    from expunge.cli.forget import run

    (tmp_path / "r.toml").write_text('model = "py:mynet:build"\ntrain = "world:digits/train"\nforget = "class:3"\nout = "there"\n')
    for error in (SettingError, ModelError):
        monkeypatch.setattr(
            recipe, "run", lambda *_, error=error, **__: logging.getLogger("expunge.test").info("hello") or (_ for _ in ()).throw(error("enough"))
        )
        with pytest.raises(error, match="enough"):
            run(str(tmp_path / "r.toml"), as_json=True)
        assert (tmp_path / "there").exists() == (error is ModelError), "a mistake of the user leaves nothing"
    assert [line.split(": ")[-1] for line in lines(tmp_path / "there")[1:]] == ["hello", "ended by ModelError"]


def test_a_programs_own_handlers_hear_what_they_asked_for():
    """A handler on the root logger, as `logging.basicConfig` of any library leaves one, takes all levels: it must not be told of what only a run.log wants."""
    heard, said = [], []
    root, old = logging.getLogger(), logging.getLogger("expunge").propagate
    handler = logging.Handler()
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))
    root.addHandler(handler)
    try:
        with log.heard(said.append, logging.DEBUG), log.heard(said.append):
            for level in ("debug", "info", "warning"):
                getattr(logging.getLogger("expunge.test"), level)(level)
        logging.getLogger("expunge.test").warning("after")
    finally:
        root.removeHandler(handler)
    assert heard == [("WARNING", "warning"), ("WARNING", "after")] and logging.getLogger("expunge").propagate == old
    assert said.count("debug") == 1 and said.count("info") == said.count("warning") == 2
