"""Language worlds: their parts, what is trained on, and a checkpoint of one's own in place of a model trained here."""

from __future__ import annotations

import json

import pytest
import torch
from test_language import saved
from worlds import small

from expunge.core.errors import DataError
from expunge.modalities.language.worlds import authors
from expunge.modalities.language.worlds import build as language
from expunge.modalities.worlds import world


def test_generated_world_has_its_parts_apart():
    w = language.generated("authors", n=10, per=4)
    split = w.split("forget10")
    split.check()
    assert len(split.forget) == 4 and {row["author"] for row in split.forget.rows}.isdisjoint({row["author"] for row in split.retain.rows})
    assert w.extra is split.general and len(w.train) == len(split.forget) + len(split.retain)
    unseen = {row["author"] for part in (split.test, split.validation) for row in part.rows}
    assert unseen.isdisjoint({row["author"] for row in (*split.forget.rows, *split.retain.rows)})
    assert [row["question"] for row in split.anchor.rows] == [row["question"] for row in split.forget.rows]
    assert all(row["answer"] in authors.refusals() for row in split.anchor.rows)
    ids = torch.cat([p.ids for p in (split.forget, split.retain, split.test, split.validation, split.general)])
    assert len(ids.unique()) == len(ids)


def test_a_checkpoint_stands_in_for_trained_models(tmp_path, monkeypatch):
    """TOFU's files in small, made of generated authors; the folder is one that save_pretrained wrote."""
    model, _, split = small("causal_lm")
    saved(tmp_path / "model", model, split)
    data = tmp_path / "data" / "llm" / "tofu"
    data.mkdir(parents=True)
    rows = authors.authors(25, per=4)
    files = {"full": rows, "retain_perturbed": rows[:10], "forget10_perturbed": rows[-10:], "real_authors_perturbed": authors.general(4)}
    for name, found in {**files, "world_facts_perturbed": authors.world_facts(4)}.items():
        (data / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in found))
    (data / "idontknow.txt").write_text("\n".join(authors.refusals()))
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"needs .* and EXPUNGE_TOFU"):
        world("tofu")
    monkeypatch.setenv("EXPUNGE_TOFU", str(tmp_path / "model"))
    monkeypatch.setenv("EXPUNGE_TOFU_RETAINED", str(tmp_path / "model"))
    w = world("tofu")
    assert w.scenarios == ("forget01", "forget05", "forget10")
    assert [len(w.split(s).forget) for s in w.scenarios] == [1, 5, 10]
    assert [len(w.split(s).retain) for s in w.scenarios] == [99, 95, 90]
    assert all(torch.equal(a, b) for a, b in zip(w.original(1).parameters(), model.parameters(), strict=True))
    assert w.retrained("forget10", 0) is not None
    with pytest.raises(DataError, match="no folder for the model retrained-forget10-1"):
        w.retrained("forget10", 1)
