"""What is audited is what is released: the folder that a run releases is loaded back by its own library and compared with the candidate that passed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError, ModelError, unwritten
from expunge.core.modality import Opened
from expunge.engine.likeness import likeness
from expunge.engine.results import GUARD, renamed
from expunge.planning.folders import fresh
from expunge.planning.outcome import Verdict, patched


def released(opened: Opened, verdict: Verdict, folder: Path) -> tuple[Verdict, dict[str, Any]]:
    """The verdict, and what a report says of the folder: form, what it was compared by, or why there is none.

    Each of `opened.forms` is written and loaded back until one is the audited model; a folder that is not is taken away. Where none is, the verdict is
    withdrawn: what passed cannot be released, and the reasons say why; `unwritten` says so where no gate had a part in it, but the disk alone. A patch that
    changes no weight has no folder.
    """
    if verdict.chosen is None:
        return verdict, {}
    audited, reasons, full = None, [], []
    for form in opened.forms:
        try:
            written = opened.release(verdict, folder, form)
            if written is None:
                return verdict, {}
            if opened.reload is None:
                return verdict, {"form": form, "told": "it was not loaded back: models of this kind say no way to"}
            audited = audited if audited is not None else patched(verdict.probe.before, verdict.chosen.attempt)
            found = likeness(audited, opened.reload(written), opened.task, opened.split, opened.answers, before=verdict.probe.before)
        except ExpungeError as error:
            if not isinstance(error, ModelError) and not unwritten(error):
                raise
            reasons.append(f"nothing was released as {form}: {error}")
            full += [reasons[-1]] if unwritten(error) else []
        else:
            if found.same:
                facts = {"form": form, "bits": found.bits, "apart": found.apart, "moved": found.moved, "records": found.records}
                return verdict, {**facts, "told": "; ".join([found.told, *reasons])}
            reasons.append(f"the folder written as {form} is not the model that was audited: loaded back, {found.why}")
        shutil.rmtree(folder, ignore_errors=True)
    return withdrawn(verdict, reasons), {"told": "; ".join(reasons), **({"unwritten": full[0]} if full else {})}


def written(opened: Opened, verdict: Verdict, folder: Path | str, mark: tuple[str, str] | None) -> Path:
    """The folder of the try that is shown, as a run releases it: with all that stands in the given folder beside the weights, loaded back and compared.

    mark   (file name, text) put into it, of what may not be used
    Raises ModelError where there is nothing to write, where no form is what was audited, or where the folder cannot be written.
    """
    with renamed(folder, mark) as made:
        _, facts = released(opened, replace(verdict, chosen=verdict.shown), made)
        if "form" not in facts:
            raise ModelError(facts.get("told") or (GUARD if verdict.patch is not None else "this run left no patch: there is no edited model"))
    return Path(folder)


def withdrawn(verdict: Verdict, reasons: list[str]) -> Verdict:
    """The verdict without its choice, for these reasons."""
    tries = tuple(replace(t, reasons=(*t.reasons, *reasons)) if t is verdict.chosen else t for t in verdict.tries)
    return replace(verdict, passed=False, reasons=[*verdict.reasons, *reasons], chosen=None, tries=tries)


def finished(
    verdict: Verdict, opened: Opened, out: Path | str, title: str, key: bytes | None = None, *, candidate: bool = False
) -> tuple[Verdict, dict[str, Any]]:
    """Write a run's folder in `out` (`planning.folders`): the report, and the patch and `released` where they passed; with `candidate`, or where what passed
    could not be released, the best try that did not pass, marked. Returns the verdict and the document, with `folder` and, where they
    are, `released` and `candidate`."""
    with fresh(out) as run:
        chosen = verdict.chosen
        verdict, facts = released(opened, verdict, run.made / "released")
        document = verdict.document(title)
        document["data"]["read"] = list(opened.read)
        if facts:
            document["release"] = facts
            document["notes"].append(f"Released: {facts['told']}." if "form" in facts else f"Not released: {facts['told']}.")
        document = verdict.save(run.made, key=key, document=document)
        document["folder"] = str(run.place)
        if "form" in facts:
            document["released"] = str(run.place / "released")
        if (candidate or chosen is not verdict.chosen) and not verdict.passed and verdict.shown is not None and verdict.shown.attempt.patch is not None:
            verdict.keep(run.made / "candidate", key)
            document["candidate"] = str(run.place / "candidate")
    return verdict, document
