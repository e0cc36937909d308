"""Concepts: the card's numbers, planted directions that must be found, the sparse layer against its optimality conditions, and the report."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from worlds import accuracy, copied, digits, same, small, state

from expunge.audits.core import Probe
from expunge.audits.records.concepts import attributions
from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn
from expunge.methods.classifiers.class_concepts import TARGETS, poisoned
from expunge.parts.scopes import concepts
from expunge.parts.scopes.concepts import KINDS, Bottleneck, bank, bottleneck, cav, class_vectors, contributions, directions, exclusive, integrated_gradients

PARTS = torch.tensor([[3.0, 0, 0, 0, 0, 1], [0, 2.0, 2, 0, 0, 0], [0, 0, 0, 1.0, 3, 0]]).double()
"""Three concepts in six features, each with places of its own."""

LINKS = torch.tensor([[4.0, 4.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]]).double()
"""What each of three classes is made of: class 0 of concept 0, its own, and of concept 1, which class 1 has too."""


def planted(n: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, 6) >= 0 and labels (n,): each concept in its own amount, down to almost nothing, so that the parts can be told apart."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return LINKS[labels] * torch.rand(n, 3, generator=g, dtype=torch.double) @ PARTS, labels


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T


# numbers of the card


def test_card_score():
    assert concepts.projections(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]])).tolist() == [[1.5]]


def test_card_attribution():
    """W_c = (2, -1, 0), a = (1.5, .5, 3), b_c = .2: (3, -.5, 0), sum 2.5 = y(a) - y(0), concept 0 first."""
    layer, a = Bottleneck(torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([0.2])), torch.tensor([[1.5, 0.5, 3.0]])
    found = contributions(layer, a, 0)
    assert found.tolist() == [[3.0, -0.5, 0.0]]
    assert float(found.sum()) == pytest.approx(2.5) == float(layer.logits(a) - layer.logits(torch.zeros(1, 3)))
    assert torch.allclose(found, integrated_gradients(lambda x: layer.logits(x)[:, 0], a))
    assert concepts.linked(found[0], 1).tolist() == [0]


def test_attributions_of_a_curved_head_are_complete():
    """The sum is f(a) - f(base) at 32 steps; one step is not enough. A concept that f ignores gets exactly 0."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 5, generator=g, dtype=torch.double)
    w[:, 2] = 0
    a, base = torch.randn(7, 5, generator=g, dtype=torch.double), torch.randn(1, 5, generator=g, dtype=torch.double)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x @ w.T).square().sum(1)

    missing = {steps: float((integrated_gradients(f, a, base, steps=steps).sum(1) - (f(a) - f(base))).abs().max()) for steps in (1, 32)}
    assert missing[32] < 1e-2 < 0.1 < missing[1]
    assert integrated_gradients(f, a, base)[:, 2].abs().max() == 0


# directions


def test_cav_points_at_the_concept():
    g = torch.Generator().manual_seed(0)
    v = torch.tensor([[1.0, -2.0, 0.0, 2.0]])
    noise = torch.randn(1200, 4, generator=g)
    found = cav(noise[:200] + v / 4, noise[200:] - v / 4)
    assert float(cosine(found[None], v.double())) > 0.97


def test_nmf_finds_the_parts():
    features, labels = planted(600)
    found = directions(features, labels, kind="nmf", count=3)
    assert float(cosine(found, PARTS).amax(0).min()) > 0.98


def test_pca_directions_are_orthogonal_and_span_the_data():
    features, labels = planted()
    found = directions(features, labels, kind="pca", count=6)
    assert torch.allclose(found @ found.T, torch.eye(len(found)).double(), atol=1e-8)
    centred = features - features.mean(0)
    assert torch.allclose(centred @ found.T @ found, centred, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_centred_and_scaled_on_the_ordinary_records(kind):
    """Whatever the units and the level of a feature; and the same seed gives the same directions."""
    features, labels = planted()
    found = bank(features, labels, features[:40], kind=kind, count=3)
    a = found.scores(features[:40])
    assert torch.allclose(a.mean(0), torch.zeros(3).double(), atol=1e-9) and torch.allclose(a.std(0, correction=0), torch.ones(3).double(), atol=1e-9)
    assert torch.equal(found.directions, bank(features, labels, features[:40], kind=kind, count=3).directions)


def test_no_more_directions_than_there_are_features_or_records():
    features, labels = planted()
    assert len(directions(features, labels, count=50)) <= 6
    assert len(directions(features[:2], labels[:2], count=50)) <= 2


def test_directions_say_what_they_cannot_do():
    features, labels = planted()
    with pytest.raises(SettingError, match="kind must be one of nmf, pca, cav, not 'clip'"):
        directions(features, labels, kind="clip")
    with pytest.raises(SettingError, match="'nmf' needs features that are not negative"):
        directions(features - 1, labels)
    with pytest.raises(SplitError, match="holds no concept"):
        bank(torch.zeros(9, 4), torch.zeros(9), torch.zeros(9, 4))


# the sparse layer


@pytest.mark.parametrize("soft", [False, True])
def test_bottleneck_is_optimal(soft):
    """Elastic net: where W is not 0 the slope is -penalty (l1 sign + (1 - l1) W), where it is 0 the slope is within penalty l1; bias slope 0."""
    features, labels = planted()
    a = bank(features, labels, features, count=3).scores(features)
    target = torch.eye(3).double()[labels]
    target = 0.8 * target + 0.2 / 3 if soft else target
    found = bottleneck(a, target if soft else labels, 3, penalty=0.02, l1=0.7, steps=4000)
    error = (found.logits(a).softmax(1) - target) / len(a)
    slope, zero = error.T @ a, found.weight == 0
    want = -0.02 * (0.7 * found.weight.sign() + 0.3 * found.weight)
    assert bool(zero.any()) and not bool(zero.all())
    assert torch.allclose(slope[~zero], want[~zero], atol=1e-6) and bool((slope[zero].abs() <= 0.02 * 0.7 + 1e-6).all())
    assert float(error.sum(0).abs().max()) < 1e-6


def test_links_of_the_planted_classes():
    """Concept 0 is class 0's own, concept 1 is shared with class 1; class 1 is nearest to class 0."""
    features, labels = planted()
    found = bank(features, labels, features, count=3)
    own, shared, _ = cosine(found.directions, PARTS).argmax(0).tolist()
    layer = bottleneck(found.scores(features), labels, 3)
    vectors = class_vectors(layer, found.scores(features), labels)
    assert concepts.linked(vectors[0], 1).tolist() == [own]
    assert own in exclusive(vectors, 0, 3).tolist()
    assert shared not in exclusive(vectors, 0, 3).tolist()
    assert concepts.nearest_classes(vectors, 0, torch.tensor([2, 1])).tolist() == [1, 2]


def test_class_vectors_leave_absent_classes_at_nothing():
    layer = Bottleneck(torch.ones(3, 2), torch.zeros(3))
    found = class_vectors(layer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 0]))
    assert found.tolist() == [[2.0, 3.0], [0.0, 0.0], [0.0, 0.0]]


# labels

LAYER = Bottleneck(torch.tensor([[5.0, 1.0, 0.0], [4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(4))
SCORES = torch.tensor([[9.0, 2.0, 1.0], [9.0, 1.0, 2.0]])
OWN = torch.tensor([[9.0, 2.0, 0.0], [1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 9.0]])


def test_nearest_labels_follow_what_is_shared():
    """Concept 0 is exclusive to class 0 and set aside, although class 1 reads it too: the records go by concepts 1 and 2."""
    found = poisoned("nearest", LAYER, SCORES, torch.tensor([0, 0]), OWN, torch.tensor([1, 2, 3]), 1)
    assert exclusive(OWN, 0, 1).tolist() == [0]
    assert found.tolist() == [2, 3]


def test_class_label_is_the_one_that_shares_most():
    """cos(OWN_0, OWN_1) = .976, the others .625 and 0."""
    assert poisoned("class", LAYER, SCORES, torch.tensor([0, 0]), OWN, torch.tensor([1, 2, 3]), 1).tolist() == [1, 1]


@pytest.mark.parametrize("target", TARGETS)
def test_labels_are_wrong_and_kept(target):
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    found = poisoned(target, LAYER, torch.randn(40, 3), labels, OWN, torch.tensor([1, 2, 3]), 2)
    assert bool((found != labels).all()) and set(found.tolist()) <= {1, 2, 3}
    assert target != "random" or {c: int((found[labels == 1] == c).sum()) for c in (2, 3)}[2] not in (0, 20)


@pytest.mark.parametrize("target", TARGETS)
def test_labels_need_another_class(target):
    with pytest.raises(SplitError, match="no class other than 0"):
        poisoned(target, LAYER, SCORES, torch.tensor([0, 0]), OWN, torch.tensor([0]), 1)


# the method


@pytest.mark.parametrize("target", TARGETS)
def test_method_forgets_the_class(target):
    model, task, split = digits()
    before, twin = state(model), copied(model)
    METHODS["class_concepts"](model, task, split, target=target, epochs=10, concepts="pca").apply(twin)
    assert same(before, state(model))
    assert accuracy(twin, split.forget) < 0.05 and accuracy(twin, split.retain) > 0.85


def test_labels_by_concepts_harm_less_than_random_ones():
    model, task, split = digits()
    kept = {}
    for target in ("nearest", "random"):
        twin = copied(model)
        METHODS["class_concepts"](model, task, split, target=target, epochs=5).apply(twin)
        kept[target] = accuracy(twin, split.retain)
    assert kept["nearest"] > kept["random"] + 0.02


@pytest.mark.parametrize("concept", KINDS)
def test_method_cost_and_determinism(concept):
    model, task, split = small("classification")
    runs = [unlearn("class_concepts", model, task, split, concepts=concept, epochs=2, batch_size=8, seed=seed) for seed in (1, 1, 2)]
    assert METHODS["class_concepts"].expected(split, runs[0].settings) == (runs[0].meter.forward, runs[0].meter.backward)
    assert runs[0].patch.digest == runs[1].patch.digest != runs[2].patch.digest
    assert set(runs[0].meter.seen) == {"forget", "retain"}


def test_method_edits_the_last_layers_when_told():
    model, task, split = small("classification")
    patch = METHODS["class_concepts"](model, task, split, last=1, buffers="freeze")
    assert {e.name for e in patch.edits} == {"8.weight", "8.bias"}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target": "far"}, SettingError, "target must be one of nearest, class, random, not 'far'"),
        ({"count": 0}, SettingError, "count and q must be 1 or larger"),
        ({"q": 0}, SettingError, "count and q must be 1 or larger"),
        ({"concepts": "clip"}, SettingError, "kind must be one of"),
        ({"layer": "0"}, SettingError, "not negative"),
        ({"layer": "nowhere"}, ModelError, "no module 'nowhere'"),
    ],
)
def test_method_settings_are_checked(settings, error, words):
    model, task, split = small("classification")
    with pytest.raises(error, match=words):
        METHODS["class_concepts"](model, task, split, **settings)


# the report


def report(model, after, task, split, **settings) -> dict:
    return {r.name: r for r in attributions(Probe(model, after, task, split), kind="pca", **settings)}


def test_an_untouched_model_has_everything_left():
    model, task, split = digits()
    rows = report(model, copied(model), task, split, q=3)
    assert rows["concepts.3.left"].value == pytest.approx(1) == rows["concepts.3.held"].value
    pairs = [(r, rows[name.replace("before", "after")]) for name, r in rows.items() if name.startswith("concepts.3.") and name.endswith("before")]
    assert len(pairs) == 3 and all(a.value == b.value and a.low < a.value < a.high for a, b in pairs)
    assert [a.value for a, _ in pairs] == sorted((a.value for a, _ in pairs), key=abs, reverse=True)
    assert rows["concepts.3.neighbour"].value == 0 and rows["concepts.fidelity.before"].value > 0.95


def test_a_new_last_layer_leaves_the_concepts_in_the_features():
    """Nothing of the class counts in the answers, all of it is still held: what a report on answers alone would miss."""
    model, task, split = digits()
    twin = copied(model)
    METHODS["class_concepts"](model, task, split, last=1, lr=0.05, epochs=10, concepts="pca").apply(twin)
    rows = report(model, twin, task, split)
    assert accuracy(twin, split.forget) < 0.05
    assert rows["concepts.3.left"].high < 0.2
    assert rows["concepts.3.held"].value == pytest.approx(1, abs=1e-6)
    assert rows["concepts.3.left"].low <= rows["concepts.3.left"].value <= rows["concepts.3.left"].high


def test_harm_to_a_neighbour_is_seen():
    """A model that never answers the class nearest to the removed one: the row names that class."""
    model, task, split = digits()
    rows = report(model, copied(model), task, split)
    nearest = int(rows["concepts.3.neighbour"].note.split("[")[1].split(",")[0])
    twin = copied(model)
    with torch.no_grad():
        twin[9].bias[nearest] -= 100
    harmed = report(model, twin, task, split)["concepts.3.neighbour"]
    assert harmed.value > 0.8 and harmed.note.startswith(f"class {nearest},") and harmed.low > 0.7


def test_the_report_is_of_removed_classes():
    model, task, split = digits("random")
    with pytest.raises(SplitError, match="read for a removed class"):
        attributions(Probe(model, model, task, split))
    model, task, split = digits()
    names = report(model, model, task, replace(split, test=None))
    assert "concepts.3.left" in names and "concepts.3.neighbour" not in names
