"""The loop and what it reads: known answers, schedules, refusal of bad losses, batches that can be read in any order; augmentation."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_data, make_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import Diverged, SettingError, SplitError
from expunge.core.session import Session, edit, scratch
from expunge.core.types import Batches, Paired, Scope
from expunge.data.records.augment import crop_flip, draw
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.updates.descend import SCHEDULES, alternate, descend


class Point(nn.Module):
    """One vector of weights."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def point(*values: float) -> tuple[Session, nn.Parameter]:
    model = Point(*values)
    return scratch(model), model.w


def half_square(w: torch.Tensor):
    return lambda _: (w**2).sum() / 2


def test_quadratic_has_the_known_answer():
    """On w^2 / 2 one step multiplies w by 1 - lr: after k steps w0 (1 - lr)^k, and the loss before step k is w0^2 (1 - lr)^2k / 2."""
    session, w = point(4.0)
    losses = descend(session, half_square(w), range(5), lr=0.25)
    assert float(w.detach()) == pytest.approx(4 * 0.75**5)
    assert losses == pytest.approx([8 * 0.75 ** (2 * k) for k in range(5)])
    assert w.grad is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_small_steps_of_half_precision_weights_add_up(optimizer):
    """In bfloat16, 1 - 0.001 rounds to 1, so 64 such steps on their own leave the weight where it was; taken on float32 masters they move it by 0.064."""
    model = Point(1.0).bfloat16()
    assert float(model.w.detach() - 0.001) == 1
    descend(scratch(model), lambda _: model.w.sum(), range(64), lr=0.001, optimizer=optimizer)
    assert model.w.dtype == torch.bfloat16 and model.w.grad is None
    assert float(model.w.detach()) == pytest.approx(1 - 0.064, abs=0.004)


def test_what_is_written_to_a_half_precision_weight_stands():
    """A proximal step between two gradient steps is not undone by the masters."""
    model = Point(1.0).bfloat16()

    def after(step: int) -> None:
        if step == 0:
            with torch.no_grad():
                model.w.fill_(-2.0)

    descend(scratch(model), lambda _: model.w.sum(), range(2), lr=0.25, after=after)
    assert float(model.w.detach()) == -2.25


def test_momentum_and_decay_have_the_known_answer():
    """SGD: v <- mu v + g + wd w; w <- w - lr v, written out by hand for three steps."""
    session, w = point(2.0)
    descend(session, half_square(w), range(3), lr=0.1, momentum=0.9, weight_decay=0.5)
    x, v = 2.0, 0.0
    for _ in range(3):
        v = 0.9 * v + 1.5 * x
        x -= 0.1 * v
    assert float(w.detach()) == pytest.approx(x)


@pytest.mark.parametrize(
    ("name", "points"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.25]), ("cosine", [1, 0.5, 0.14644661]), ("onecycle", [0, 0.69134172, 0.22221488])]
)
def test_schedules_have_known_points(name, points):
    assert [SCHEDULES[name](t) for t in (0, 0.5, 0.75)] == pytest.approx(points)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_multiplies_the_step(name):
    """With a gradient of 1 the way gone is lr times the sum of the schedule."""
    session, w = point(0.0)
    descend(session, lambda _: w.sum(), range(10), lr=0.5, schedule=name)
    assert float(w.detach()) == pytest.approx(-0.5 * sum(SCHEDULES[name](k / 10) for k in range(10)))


def test_decay_counts_phases_and_state_is_shared():
    session, w = point(0.0)
    alternate(session, (lambda _: w.sum(), range(2)), (lambda _: w.sum(), range(3)), lr=1.0, decay=lambda phase: 0.1**phase)
    assert float(w.detach()) == pytest.approx(-2.3)
    session, w = point(0.0)
    alternate(session, (lambda _: w.sum(), range(1)), (lambda _: 0 * w.sum(), range(1)), lr=1.0, momentum=0.5)
    assert float(w.detach()) == pytest.approx(-1.5), "the second phase carries the first one's momentum on"


def test_clip_bounds_the_step_over_the_scope_alone():
    model = Point(3.0, 4.0, 0.0)
    mask = torch.tensor([True, True, False])
    with edit(model, Scope({"w": mask})) as e:
        descend(e, lambda _: (model.w[:2] ** 2).sum() / 2 + 1000 * model.w[2], range(1), lr=1.0, clip=1.0)
        moved = model.w.detach().clone()
    torch.testing.assert_close(moved, torch.tensor([2.4, 3.2, 0.0]))


def test_after_is_called_once_a_step_is_taken():
    session, w = point(1.0)
    seen = []
    descend(session, half_square(w), range(3), lr=0.5, after=lambda k: seen.append((k, float(w.detach()))))
    assert seen == [(0, 0.5), (1, 0.25), (2, 0.125)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "loss is nan at step 1"),
        (math.inf, "loss is inf at step 1"),
        (1e6, r"loss is 1e\+06 at step 1, beyond the limit 10000; lower lr \(now 0.5\) or set clip"),
    ],
)
def test_bad_loss_is_refused_before_the_step(value, message):
    session, w = point(1.0)
    with pytest.raises(Diverged, match=message):
        descend(session, lambda k: w.sum() * (1.0 if k == 0 else value / float(w.detach().sum())), range(3), lr=0.5)
    assert float(w.detach()) == 0.5


def test_diverged_run_rolls_back():
    model = Point(1.0)
    with pytest.raises(Diverged), edit(model, Scope({"w": None})) as e:
        descend(e, lambda _: -(model.w**2).sum(), range(100), lr=1.0)
    assert model.w.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or larger"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": 1, "schedule": "x"}, "schedule must be one of"),
        ({"lr": 1, "optimizer": "x"}, "optimizer must be one of sgd"),
    ],
)
def test_bad_options(options, message):
    session, w = point(1.0)
    with pytest.raises(SettingError, match=message):
        descend(session, half_square(w), range(1), **options)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_every_optimiser_descends_and_keeps_the_wall(optimizer):
    model = Point(1.0, 1.0)
    with edit(model, Scope({"w": torch.tensor([True, False])})) as e:
        descend(e, half_square(model.w), range(20), lr=0.05, optimizer=optimizer, momentum=0.5 if optimizer == "nesterov" else 0.0, weight_decay=0.01)
        moved, kept = model.w.tolist()
    assert abs(moved) < 0.5 and kept == 1.0


def test_step_budget_stops_early_and_is_no_error():
    session, w = point(4.0)
    with guard.watching(guard.Guard(max_steps=3)) as g:
        losses = descend(session, half_square(w), range(10), lr=0.5)
    assert len(losses) == 3 and g.stopped == "budget of steps reached" and g.meter.gradient


def loop_once(seed: int) -> list[torch.Tensor]:
    model, task, data = make_net(3), classification(), make_data(20, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        session = scratch(model)
        session.train()
        descend(session, lambda b: task.forward(model, b).mean.mean(), task.batches(data, 8, epochs=2, seed=seed), lr=0.1, momentum=0.9)
    return [p.detach().clone() for p in model.parameters()]


def test_same_seed_same_bits():
    a, b, c = loop_once(0), loop_once(0), loop_once(1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


# batches


def indices(data, index, generator):
    return {"i": index, "draw": None if generator is None else float(torch.rand((), generator=generator))}


@given(n=st.integers(1, 300), size=st.integers(1, 130), epochs=st.sampled_from([0.3, 1, 2, 2.5]), seed=st.none() | st.integers(0, 99), data=st.data())
def test_batches_are_reachable_in_any_order(n, size, epochs, seed, data):
    def fresh() -> Batches:
        return Batches(indices, range(n), size, epochs, seed)

    read = list(fresh())
    assert len(read) == len(fresh()) == max(1, round(-(-n // size) * epochs))
    again = fresh()
    for k in data.draw(st.permutations(range(len(read)))):
        assert torch.equal(again[k]["i"], read[k]["i"]) and again[k]["draw"] == read[k]["draw"]
    with pytest.raises(IndexError):
        again[len(read)]
    sizes = [len(b["i"]) for b in read]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    per = -(-n // size)
    for epoch in range(len(read) // per):
        drawn = torch.cat([b["i"] for b in read[epoch * per : (epoch + 1) * per]])
        assert sorted(drawn.tolist()) == list(range(n))
        assert seed is not None or drawn.tolist() == list(range(n))


def test_no_batch_of_one():
    """129 examples at size 128 are 64 + 65: batch norm never sees a single example."""
    assert [len(b["i"]) for b in Batches(indices, range(129), 128, 1, 0)] == [64, 65]


def test_epochs_are_shuffled_apart_and_draws_differ():
    read = list(Batches(indices, range(50), 50, 3, 0))
    assert len({tuple(b["i"].tolist()) for b in read}) == 3 and len({b["draw"] for b in read}) == 3
    assert Batches(indices, range(50), 50, 1, 1)[0]["i"].tolist() != read[0]["i"].tolist()
    assert Batches(indices, range(3), 2)[0]["draw"] is None


def test_batches_of_nothing():
    with pytest.raises(SplitError, match="empty part"):
        Batches(indices, [], 2)
    with pytest.raises(ValueError, match="batch size must be at least 1, not 0"):
        Batches(indices, range(2), 0)


def test_pairs_cycle_the_shorter_stream():
    assert list(Paired("ab", "12345")) == [("a", "1"), ("b", "2"), ("a", "3"), ("b", "4"), ("a", "5")]
    assert Paired("ab", "12345")[3] == ("b", "4")
    with pytest.raises(IndexError):
        Paired("ab", "12345")[5]


# augmentation


def slow_crop_flip(x: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """One image after another: pad, cut, mirror."""
    out = []
    for image, top, left, mirror in zip(x, *draw(len(x), padding, generator), strict=True):
        padded = F.pad(image, (padding,) * 4)
        window = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        out.append(window.flip(2) if mirror else window)
    return torch.stack(out)


@given(
    b=st.integers(1, 9), c=st.integers(1, 4), h=st.integers(1, 9), w=st.integers(1, 9), padding=st.integers(0, 5), seed=st.integers(0, 99), last=st.booleans()
)
def test_crop_flip_equals_the_loop(b, c, h, w, padding, seed, last):
    x = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(seed))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    fast, slow = crop_flip(padding)(x, torch.Generator().manual_seed(seed)), slow_crop_flip(x, padding, torch.Generator().manual_seed(seed))
    assert torch.equal(fast, slow)


def test_crop_flip_covers_all_places_evenly():
    """Padding 1: 9 places and 2 mirrors; 18,000 draws give each of the 18 within 5 standard deviations of 1,000."""
    top, left, mirror = draw(18_000, 1, torch.Generator().manual_seed(0))
    counts = torch.bincount(6 * top + 2 * left + mirror.long(), minlength=18)
    assert len(counts) == 18 and (counts - 1000).abs().max() < 5 * math.sqrt(1000 * 17 / 18)
    with pytest.raises(SettingError, match="padding must be 0 or larger, not -1"):
        crop_flip(-1)


def test_augmentation_reaches_training_batches_only():
    data = make_data(12, 0)
    data = Examples(data.x, data.y, data.ids, crop_flip(1))
    task = classification()
    assert torch.equal(task.batches(data, 12)[0]["x"], data.x)
    batch = task.batches(data, 12, seed=0)[0]
    assert not torch.equal(batch["x"], data.x[batch["i"]])
    assert torch.equal(batch["x"], task.batches(data, 12, seed=0)[0]["x"])
