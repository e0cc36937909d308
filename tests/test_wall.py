"""The session's wall: what is outside the scope keeps its bits, what is outside the session never happened."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_data, make_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from expunge.core.edits import bits
from expunge.core.errors import Diverged, ScopeError
from expunge.core.session import edit, recompute
from expunge.core.types import Scope
from expunge.modalities.classification.task import classification
from expunge.parts.scopes.layers import everything, match
from expunge.parts.updates.descend import descend

STEPPERS = {
    "sgd": lambda p, m, w: torch.optim.SGD(p, 0.1, momentum=m, weight_decay=w, nesterov=m > 0),
    "adam": lambda p, m, w: torch.optim.Adam(p, 0.1, weight_decay=w, amsgrad=m > 0),
    "adamw": lambda p, m, w: torch.optim.AdamW(p, 0.1, weight_decay=w),
    "rmsprop": lambda p, m, w: torch.optim.RMSprop(p, 0.05, momentum=m, weight_decay=w),
    "adagrad": lambda p, m, w: torch.optim.Adagrad(p, 0.1, weight_decay=w),
    "lbfgs": lambda p, m, w: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


def raw(model: nn.Module) -> dict[str, torch.Tensor]:
    """The bits of all parameters and buffers, as copies."""
    return {n: bits(t).clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def negative_zeros(model: nn.Module) -> None:
    """Every third weight becomes -0.0, whose bits differ from those of 0.0 although the numbers are equal."""
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::3] = -0.0


def random_scope(model: nn.Module, density: float, seed: int, buffers: str) -> Scope:
    """Masks of the given density over about three quarters of the tensors; the first place of the last bias, which always has a gradient, may move."""
    g = torch.Generator().manual_seed(seed)
    named = list(model.named_parameters())
    masks = {n: torch.rand(p.shape, generator=g) < density for n, p in named if p is named[-1][1] or torch.rand((), generator=g) < 0.75}
    masks[named[-1][0]][0] = True
    return Scope(masks, buffers)


@given(
    name=st.sampled_from(sorted(STEPPERS)), momentum=st.sampled_from([0.0, 0.9]), decay=st.sampled_from([0.0, 0.1]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), seed=st.integers(0, 10_000), buffers=st.sampled_from(["move", "freeze"]),
)  # fmt: skip
def test_scope_is_a_wall(name, momentum, decay, density, seed, buffers):
    model, data = make_net(seed), make_data(12, seed)
    negative_zeros(model)
    before = raw(model)
    scope = random_scope(model, density, seed, buffers)
    with edit(model, scope) as e:
        e.train()
        stepper = STEPPERS[name](list(e.params.values()), momentum, decay)

        def closure():
            stepper.zero_grad()
            loss = F.cross_entropy(model(data.x), data.y)
            loss.backward()
            return loss

        for _ in range(3):
            stepper.step(closure)
            now = raw(model)
            for tensor, p in model.named_parameters():
                mask = scope.masks.get(tensor, torch.zeros(p.shape, dtype=torch.bool))
                assert torch.equal(now[tensor][~mask], before[tensor][~mask]), f"{name} moved frozen places of {tensor}"
            assert torch.isfinite(torch.cat([p.reshape(-1) for p in model.parameters()])).all()
    assert same(raw(model), before)
    for change in e.patch.edits:
        if change.name in scope.masks:
            moved = change.mask if change.mask is not None else torch.ones_like(scope.masks[change.name])
            assert not (moved & ~scope.masks[change.name]).any()
    assert any(change.name in scope.masks for change in e.patch.edits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_wall_in_other_types(dtype):
    model = nn.Linear(6, 4).to(dtype)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0] = True
    before = raw(model)
    with edit(model, Scope({"weight": mask})) as e:
        stepper = torch.optim.SGD(list(e.params.values()), 0.5, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            stepper.zero_grad()
            model(torch.ones(2, 6, dtype=dtype)).pow(2).sum().backward()
            stepper.step()
            assert torch.equal(bits(model.weight)[1:], before["weight"][1:])
            assert not torch.equal(bits(model.weight)[0], before["weight"][0])
    assert same(raw(model), before)


def test_direct_writes_outside_the_mask_are_undone(net):
    mask = torch.zeros_like(net[4].weight, dtype=torch.bool)
    mask[0, 0] = True
    before = raw(net)
    with edit(net, Scope({"4.weight": mask})) as e, torch.no_grad():
        net[4].weight.fill_(2.0)
    (change,) = e.patch.edits
    assert change.name == "4.weight" and torch.equal(change.mask, mask) and change.values.tolist() == [2.0]
    assert same(raw(net), before)


def test_step_on_a_tensor_outside_the_scope_is_refused(net):
    before = raw(net)
    with pytest.raises(ScopeError, match=r"the optimiser wrote to 4\.weight, which is outside the scope; give it e\.params only"):
        with edit(net, match(net, "6.*")):
            net[4].weight.grad = torch.ones_like(net[4].weight)
            torch.optim.SGD([net[4].weight], 0.1).step()
    torch.testing.assert_close(raw(net)["6.weight"], before["6.weight"])


def test_lbfgs_over_a_tensor_outside_the_scope_is_refused_or_leaves_its_bits():
    """LBFGS adds its direction to every tensor it was given, so -0.0 + 0 becomes 0.0 even where no gradient arrived."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    negative_zeros(model)
    before = bits(model[0].weight).clone()
    refused = False
    try:
        with edit(model, match(model, "1.*")):
            stepper = torch.optim.LBFGS(list(model.parameters()), 0.1, max_iter=2)

            def closure():
                stepper.zero_grad()
                loss = model(torch.ones(2, 3)).pow(2).sum()
                loss.backward()
                return loss

            stepper.step(closure)
    except ScopeError:
        refused = True
    assert refused or torch.equal(bits(model[0].weight), before)


def outside(model: nn.Module) -> tuple:
    """Everything that must be as it was once a session has closed."""
    grads = {n: (None if p.grad is None else (id(p.grad), p.grad.clone())) for n, p in model.named_parameters()}
    return raw(model), {n: p.requires_grad for n, p in model.named_parameters()}, grads, {n: m.training for n, m in model.named_modules()}


def check_outside(before: tuple, after: tuple) -> None:
    assert same(before[0], after[0]), "parameters or buffers differ"
    assert before[1] == after[1], "requires_grad differs"
    assert before[3] == after[3], "modes differ"
    for name, grad in before[2].items():
        now = after[2][name]
        assert (grad is None) == (now is None), f"gradient of {name} came or went"
        assert grad is None or (grad[0] == now[0] and torch.equal(grad[1], now[1])), f"gradient of {name} differs"


def awkward(model: nn.Module) -> None:
    """Mixed modes, one frozen parameter, one gradient at hand."""
    model.train()
    model[1].eval()
    model[6].bias.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 7.0)


@pytest.mark.parametrize("fault", [None, RuntimeError("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("buffers", ["move", "freeze", "recompute"])
def test_outside_nothing_happened(net, fault, buffers):
    awkward(net)
    before, data, task = outside(net), make_data(16, 5), classification()
    scope = everything(net, buffers)
    caught = None
    try:
        with edit(net, scope, stats=task.batches(data, 8)) as e:
            e.train()
            descend(e, lambda b: task.forward(net, b).mean.mean(), task.batches(data, 8, epochs=2, seed=0), lr=0.1)
            if fault:
                raise fault
    except (RuntimeError, KeyboardInterrupt) as error:
        caught = error
    assert caught is fault
    check_outside(before, outside(net))
    assert (len(e.patch) == 0) == (fault is not None)


def test_diverged_weights_are_rolled_back(net):
    awkward(net)
    before = outside(net)
    with pytest.raises(Diverged, match=r"0\.weight holds values that are not finite"), edit(net, everything(net)) as e, torch.no_grad():
        e.params["0.weight"].view(-1)[3] = torch.inf
    check_outside(before, outside(net))
    assert len(e.patch) == 0


def test_hooks_do_not_outlive_the_session(net):
    with edit(net, match(net, "6.*")):
        pass
    frozen = net[4].weight.detach().clone()
    net[4].weight.grad = torch.ones_like(net[4].weight)
    torch.optim.SGD([net[4].weight], 0.1).step()
    torch.testing.assert_close(net[4].weight.detach(), frozen - 0.1)


def run_with(net: nn.Module, buffers: str):
    data, task = make_data(16, 5), classification()
    with edit(net, everything(net, buffers), stats=task.batches(data, 8)) as e:
        e.train()
        inside = []
        descend(e, lambda b: task.forward(net, b).mean.mean(), task.batches(data, 8, seed=0), lr=0.1, after=lambda _: inside.append(raw(net)["1.running_mean"]))
    return {change.name: change for change in e.patch.edits}, inside


def test_buffers_move_are_in_the_patch(net):
    before = net[1].running_mean.clone()
    patch, _ = run_with(net, "move")
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(patch)
    assert torch.equal(net[1].running_mean, before)


def test_buffers_freeze_keeps_every_bit(net):
    before = raw(net)["1.running_mean"]
    patch, inside = run_with(net, "freeze")
    assert not any(name.startswith("1.running") or name.startswith("1.num") for name in patch)
    assert len(inside) == 2 and all(torch.equal(now, before) for now in inside)


def test_buffers_recompute_is_the_plain_average(net):
    patch, _ = run_with(net, "recompute")
    edited = copy.deepcopy(net)
    with torch.no_grad():
        for name, change in patch.items():
            t = dict((*edited.named_parameters(), *edited.named_buffers()))[name]
            t[...] = change.values if change.mask is None else t.masked_scatter(change.mask, change.values)
        data = make_data(16, 5)
        pre = edited[0](data.x)
        halves = [pre[:8], pre[8:]]
        mean = torch.stack([h.mean((0, 2, 3)) for h in halves]).mean(0)
        var = torch.stack([h.transpose(0, 1).reshape(4, -1).var(1) for h in halves]).mean(0)
    torch.testing.assert_close(edited[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(edited[1].running_var, var, rtol=1e-5, atol=1e-6)


def test_recompute_leaves_weights_and_modes(net):
    awkward(net)
    before, task = outside(net), classification()
    recompute(net, task.batches(make_data(16, 5), 8))
    after = outside(net)
    assert before[1] == after[1] and before[3] == after[3]
    assert all(torch.equal(before[0][n], after[0][n]) for n, _ in net.named_parameters())
    assert not torch.equal(before[0]["1.running_mean"], after[0]["1.running_mean"])


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (Scope({}), "no weight in scope"),
        (Scope({"6.bias": torch.zeros(3, dtype=torch.bool)}), "no weight in scope"),
        (Scope({"7.bias": None}), "scope names 7.bias, which is no parameter of the model"),
        (Scope({"6.bias": torch.ones(4, dtype=torch.bool)}), r"mask of 6.bias has shape \(4,\), the weight has \(3,\)"),
        (Scope({"6.bias": None}, "recompute"), "needs retain data"),
    ],
)
def test_scopes_that_cannot_be_opened(net, scope, message):
    before = outside(net)
    with pytest.raises(ScopeError, match=message), edit(net, scope):
        pass
    check_outside(before, outside(net))
