"""The laws: what every method must keep on every task it names, or whose modality adopts it. No method has a test of its own here."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest
import torch
from worlds import copied, same, small, state, toy

from expunge.core.edits import Replace
from expunge.core.errors import ExpungeError, PatchError, SettingError, SplitError
from expunge.core.guard import Guard, current
from expunge.core.modality import MODALITIES
from expunge.core.patch import Patch
from expunge.core.registry import ASSURANCES, METHODS
from expunge.engine.run import GRADED, Attempt, unlearn
from expunge.parts.reading import score

ADOPTED = {name: [m.name for m in MODALITIES.values() if m.adopts(METHODS[name])] for name in METHODS}
"""Method -> tasks that it does not name, and whose modality adopts it."""
CASES = [pytest.param(name, task, id=f"{name}-{task}") for name in METHODS for task in (*METHODS[name].tasks, *ADOPTED[name])]
COSTLY = {
    "forgets": (
        "sfd", "salun_diffusion", "doco", "advunlearn", "trce", "mace", "all_but_one", "seuf", "adapt_then_unlearn", "adversarial_target", "concept_ablation",
        "altpo", "spm", "slug", "scar_self",
        "ebyd-text_classification", "amnesiac-text_classification", "metaunlearn-text_classification", "laf-text_classification",
        "gs_lora-text_classification", "scar-text_classification", "scar_self-text_classification", "kga-text_classification", "retrain-text_classification",
        "reset_fine_tune-text_classification", "duck-text_classification", "l1_sparse-text_classification", "prune_unlearn-text_classification",
        "stochastic_teacher-text_classification", "scrub-text_classification", "negrad_plus-text_classification", "fine_tune-multilabel",
    ),
    "patches": ("ebyd-text_classification", "kga-text_classification"),
    "cost": ("ebyd-text_classification", "kga-text_classification"),
    "smallest": ("slug", "spm", "metaunlearn", "ebyd-text_classification", "kga-text_classification"),
    "types": (
        "sfd", "salun_diffusion", "altpo", "slug", "adapt_then_unlearn", "all_but_one", "advunlearn", "ebyd-text_classification", "kga-text_classification",
    ),
    "resume": (
        "sfd", "salun_diffusion", "kga", "slug", "ebyd", "mace", "laf", "altpo", "scar_self", "scar-text_classification", "metaunlearn-text_classification",
        "gs_lora-text_classification",
    ),
    "breaks": ("sfd", "salun_diffusion", "slug", "adapt_then_unlearn", "altpo", "advunlearn"),
}  # fmt: skip
"""Law -> methods, or method-task, that take seconds for it: `make test-slow` has them."""
TOYS = {
    ("fisher_forgetting", "text_classification"): {"alpha": 1e-4},
    ("ssd", "text_classification"): {"alpha": 2.0, "lam": 0.1},
    ("gradient_ascent", "multilabel"): {"epochs": 5, "lr": 0.5},
    ("influence", "multilabel"): {"scale": 300.0, "damp": 0.1},
    ("l1_sparse", "multilabel"): {"epochs": 6.0, "lr": 0.3, "alpha": 0.002},
    ("negrad_plus", "multilabel"): {"epochs": 3.0, "lr": 0.1, "alpha": 0.8},
}
"""Settings under which a method visibly forgets in the toy world of a modality that adopts it, where those that it names do not."""


def cases(law: str) -> list:
    """CASES, those of methods that are costly under that law marked slow."""
    return [pytest.param(*c.values, id=c.id, marks=pytest.mark.slow if {c.values[0], c.id} & {*COSTLY[law]} else ()) for c in CASES]


HARSH = {
    ("boundary_expand", "classification"), ("salun", "classification"), ("gradient_ascent", "regression"), ("influence", "regression"),
    ("prune_unlearn", "regression"),
    *((name, "causal_lm") for name in ("flat", "knowledge_unlearning", "npo_sam", "random_target", "undial", "wagle")),
}  # fmt: skip
"""Methods whose toy settings cost the toy world more than half of what it was good for: they forget, and the run says what it cost."""

QUICK = {"epochs": 1, "batch_size": 8}
POOLED = {"steps": 4, "trajectories": 3, "path": 3}
"""For methods that learn from trajectories."""


def quick(name: str) -> dict:
    """Settings that make a run short, of those the method has."""
    wanted = {**QUICK, **POOLED} if "trajectories" in METHODS[name].defaults else QUICK
    return {k: type(METHODS[name].defaults[k])(v) for k, v in wanted.items() if k in METHODS[name].defaults}


def asked(name: str) -> str:
    """The kind of request that a classifier's method is tried on: a class where it is made for one."""
    return "class" if "class" in METHODS[name].forgets else "records"


@pytest.mark.parametrize(("name", "task_name"), cases("patches"))
def test_laws_1_2_3_4_5_6(name, task_name, tmp_path):
    """Model and RNG untouched; same seed, same patch; apply and inverse restore every bit; applying twice refused; disk round trip."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, rng = state(model), torch.get_rng_state()
    patch = METHODS[name](model, task, split, seed=3, **quick(name))
    assert same(before, state(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert METHODS[name](model, task, split, seed=3, **quick(name)).digest == patch.digest
    assert patch.edits, "nothing moved"
    twin = copied(model)
    inverse = patch.apply(twin)
    edited = {e.name for e in patch.edits}
    for (n, t), (_, u) in zip({**dict(twin.named_parameters()), **dict(twin.named_buffers())}.items(), before["tensors"].items(), strict=True):
        assert n in edited or torch.equal(t, u)
    with pytest.raises(PatchError, match="applied already"):
        patch.apply(twin)
    inverse.apply(twin)
    assert same(before, state(twin)) or all(torch.equal(t, before["tensors"][n]) for n, t in state(twin)["tensors"].items())
    path = patch.save(tmp_path / "p.safetensors", b"key")
    assert Patch.load(path, b"key").digest == patch.digest
    with pytest.raises(PatchError, match="not signed"):
        Patch.load(path, b"other")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(PatchError):
        Patch.load(path)


@pytest.mark.parametrize(("name", "task_name"), CASES)
def test_law_7_messages(name, task_name):
    """Unknown settings, wrong types and missing parts give the prescribed messages."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    record = METHODS[name]
    first = next(iter(record.defaults))
    with pytest.raises(SettingError, match=f"{name} has no setting '{first}x'; did you mean '{first}'"):
        unlearn(name, model, task, split, **{first + "x": 1})
    with pytest.raises(SettingError, match=f"{name}'s {first} must be"):
        unlearn(name, model, task, split, **{first: [1]})
    for part in record.needs:
        lacking = replace(split, **{part: None}) if part != "forget" else replace(split, forget=split.forget.take([]))
        with pytest.raises(SplitError, match=part):
            unlearn(name, model, task, lacking)


@pytest.mark.parametrize(("name", "task_name"), cases("forgets"))
def test_law_8_forgets_more_than_it_harms(name, task_name):
    """With its toy settings on the toy world: the forget loss rises by more than the retain loss."""
    model, task, split = toy(task_name, METHODS[name].twin == "moe")
    if asked(name) == "class" or task_name != "classification":
        attempt = unlearn(name, model, task, split, **TOYS.get((name, task_name), METHODS[name].toy))
        assert attempt.outcome == ("harmed" if (name, task_name) in HARSH else "ok"), attempt.reason
        patch = attempt.patch
    else:  # of ten records of a hundred little is seen: its records are those of a class, which only the method itself, unguarded, takes out
        patch = METHODS[name](model, task, split, **METHODS[name].toy)
    twin = copied(model)
    patch.apply(twin)
    rise = {}
    for part in ("forget", "retain"):
        a, b = score(model, task, getattr(split, part)), score(twin, task, getattr(split, part))
        if a.labels is not None:
            rise[part] = float(a.correct.float().mean() - b.correct.float().mean())
        else:
            rise[part] = float(((-a.nll).exp() - (-b.nll).exp()).mean()) if task_name == "causal_lm" else float((b.nll - a.nll).mean())
    assert rise["forget"] > max(rise["retain"], 0) + 0.02


@pytest.mark.parametrize(("name", "task_name"), cases("smallest"))
def test_law_9_smallest_sets(name, task_name):
    """A one-example forget set runs or says why not; an empty retain set is refused in one line."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    one = replace(split, forget=split.forget.take([0]))
    attempt = unlearn(name, model, task, one, **quick(name))
    assert attempt.outcome in (*GRADED, "refused", "no_op"), attempt.reason
    with pytest.raises(SplitError, match="retain is empty"):
        unlearn(name, model, task, replace(split, retain=split.retain.take([])))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(("name", "task_name"), cases("types"))
def test_law_10_float_types(name, task_name, dtype):
    """float64 and bfloat16 models run, and the patch keeps the type."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    model = model.to(dtype)
    attempt = unlearn(name, model, task, split, **quick(name))
    assert attempt.outcome in (*GRADED, "no_op"), attempt.reason
    if attempt.patch is not None:
        types = {n: p.dtype for n, p in model.named_parameters()}
        assert all(e.values.dtype == types[e.name] for e in attempt.patch.edits if e.name in types and isinstance(e, Replace))


@pytest.mark.parametrize("name", list(METHODS))
def test_law_11_manual(name):
    """The file is named after the method; the manual lists exactly the settings of the signature; declarations are known words."""
    record = METHODS[name]
    assert inspect.getmodule(record.function).__name__.endswith(f".{name}")
    section = re.search(r"^Settings\n((?:    .*\n?|\n)+)", record.manual, re.M)
    assert section, "no Settings section"
    listed = re.findall(r"^    (\w+)  +\S", section.group(1), re.M)
    assert listed == list(record.defaults)
    for heading in ("Paper", "Forgets", "Scope", "Differs", "Check"):
        assert re.search(rf"^{heading}\b", record.manual, re.M), heading
    assert record.assurance in ASSURANCES
    assert "seed" in inspect.signature(record.function).parameters


@pytest.mark.parametrize(("name", "task_name"), cases("cost"))
def test_law_12_cost(name, task_name):
    """Examples forward and backward are what the method declares."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    watch = Guard()
    attempt = unlearn(name, model, task, split, guard=watch, **quick(name))
    assert attempt.outcome in ("ok", "partial"), attempt.reason
    forward, backward = METHODS[name].expected(split, attempt.settings)
    assert watch.meter.forward <= 1.1 * forward + 64
    assert watch.meter.backward <= 1.1 * backward + 64
    if not watch.stopped:
        assert watch.meter.forward + watch.meter.backward >= 0.5 * (forward + backward) - 128


@pytest.mark.parametrize(("name", "task_name"), cases("resume"))
def test_resume_equals_uninterrupted(name, task_name, tmp_path, monkeypatch):
    """A run stopped at a checkpoint and called again gives the same patch, bit for bit; other epochs give another (the control)."""
    from expunge.core import journal

    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    whole = unlearn(name, model, task, split, seed=5, **quick(name))
    step = journal.Journal.step
    seen = []

    def killed(self, session, stepper, losses, watch, done):
        step(self, session, stepper, losses, watch, done)
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "step", killed)
    try:
        unlearn(name, model, task, split, seed=5, folder=tmp_path, checkpoint_every=1, **quick(name))
    except KeyboardInterrupt:
        monkeypatch.setattr(journal.Journal, "step", step)
        again = unlearn(name, model, task, split, seed=5, folder=tmp_path, checkpoint_every=1, **quick(name))
        assert again.patch.digest == whole.patch.digest
        assert (again.meter.steps, again.meter.backward) == (whole.meter.steps, whole.meter.backward)
    if "epochs" in METHODS[name].defaults:
        more = unlearn(name, model, task, split, seed=5, **{**quick(name), "epochs": type(METHODS[name].defaults["epochs"])(2)})
        assert more.patch is None or more.patch.digest != whole.patch.digest or more.meter.steps == whole.meter.steps


@pytest.mark.parametrize(("name", "task_name"), cases("breaks"))
def test_law_13_an_exception_leaves_the_model_whole(name, task_name):
    """Whichever of its passes breaks, one in the middle or the last: the run ends as failed, and every bit, mode, gradient and hook is as it was."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    done: list[int] = []

    def run(last: int) -> Attempt:
        """A run whose pass of that number breaks; `done` counts those of the method itself."""
        done.clear()
        watch = Guard()

        def forward(m, b):
            if current() is watch:
                done.append(1)
                if len(done) == last:
                    raise RuntimeError("out of paper\nsecond line")
            return task.forward(m, b)

        return unlearn(name, model, replace(task, forward=forward), split, guard=watch, **quick(name))

    run(0)
    before, rng, passes = state(model), torch.get_rng_state(), len(done)
    for last in {passes // 2, passes} - {0}:
        attempt = run(last)
        assert (attempt.outcome, attempt.reason, attempt.patch) == ("failed", "RuntimeError: out of paper", None)
        assert same(before, state(model)) and torch.equal(rng, torch.get_rng_state())


def test_unknown_method_suggests_the_nearest():
    model, task, split = small("classification")
    with pytest.raises(ExpungeError, match="did you mean 'salun'"):
        unlearn("saulun", model, task, split)
