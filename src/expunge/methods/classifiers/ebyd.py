"""EBYD: remove what a few clean records do not show (a backdoor): expose it in a copy, find the channels that carry it, prune them, repair.

Paper    Li et al., "Expose Before You Defend: Unifying and Enhancing Backdoor Defenses via Exposed Models", 2024.
Code     bboylyg/Expose-Before-You-Defend, Apache-2.0.
Forgets  backdoors, class: what the model does beyond the retain records. The forget set is never read.          Needs    retain (clean).
Scope    all weights; pruned channels are zero and stay zero.   Forget  E = argmin of -CE on clean data, in a copy, until its accuracy is at most `stop`; then
         m = argmin over channel gates in [0, 1] of alpha * CE(E(x; m), y); channels with the lowest m are pruned in the original.
Retain   CE on the clean records (repair).   Update  Adam ascent, SGD on gates, one-shot pruning, SGD.   Leaves  Replace.
Settings
    sample        most clean records that are read, drawn from retain
    stop          accuracy of the exposed copy on them at which the ascent ends
    epochs        most passes of the ascent
    ascent_lr     its step size (Adam)
    recover       passes over the sample while the gates are trained
    recover_lr    step size on the gates
    alpha         weight of CE while the gates are trained
    prune         share of the gated channels that is pruned, lowest gates first
    linear        gate hidden linear layers too, not batch norms (or convolutions, where there are none) alone
    repair        passes over the sample after pruning; 0 leaves it at pruning
    lr            step size of the repair
    momentum      of SGD, on gates and in the repair
    weight_decay  of the ascent and the repair
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics while repairing
Differs  Published: ascent with Adam at 1e-5 (or SGD at .01) on ResNet-18 down to an accuracy of .1 to .2, gradients clipped before they exist, which
         clips nothing. Here they are clipped at norm 20, in eval mode, and the ascent ends at .5: on small networks the trigger is lost from the
         copy soon after. Narrow networks share channels between backdoor and clean classes, so that pruning alone leaves much of
         the trigger: the repair, optional in the code, is on. The sample must be clean: manipulated records in retain that nobody has
         identified keep the backdoor alive, and nothing is removed. A class that retain lacks is exposed and removed like a backdoor.
         On 8 backdoored networks for digits (16 to 64 channels a layer, seeds not used for the defaults) success fell from .99 or more to .08 to .89,
         mean .41; repair alone left .86, and pruning as many channels at random .37: at this size the gates add nothing to pruning and repair.
Check
    >>> from torch import tensor; from expunge.data.records.expose import lowest
    >>> [(name, channel) for _, name, channel in lowest({"conv": tensor([1.0, 0.3]), "fc": tensor([0.0, 0.9])})][:2]
    [('fc', 0), ('conv', 1)]
"""

from __future__ import annotations

from torch import nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.data.records import expose
from expunge.parts.losses import nll
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


def _cost(n, s) -> tuple[float, float]:
    """An upper bound: the ascent stops when accuracy is lost."""
    sample = min(s["sample"], n["retain"])
    return sample * (2 * s["epochs"] + s["recover"] + s["repair"]), sample * (s["epochs"] + s["recover"] + s["repair"])


@method(
    paper="Expose Before You Defend (2024)", tasks=("classification",), needs=("retain",), cost=_cost, toy={"prune": 0.2},
    published={"stop": 0.1, "epochs": 20, "ascent_lr": 1e-05, "batch_size": 128}, place="code: exposes/unlearn.py; those of edr.py are from memory, unverified",
    lacks="its paper is about backdoors, which no table measures; a class it forgets at 1.17 of the passes of retraining",
)  # fmt: skip
def ebyd(
    model: nn.Module, task: Task, split: Split, *, sample: int = 500, stop: float = 0.5, epochs: int = 40, ascent_lr: float = 1e-4, recover: float = 20.0,
    recover_lr: float = 0.2, alpha: float = 0.2, prune: float = 0.2, linear: bool = True, repair: float = 20.0, lr: float = 0.01, momentum: float = 0.9,
    weight_decay: float = 5e-4, batch_size: int = 64, buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if sample < 1 or not 0 < prune < 1:
        raise SettingError(f"sample must be at least 1 and prune in (0, 1); found {sample} and {prune:g}")
    layers = list(expose.gated(model, linear))
    clean = expose.sample(split.retain, sample, seed)
    options = {"batch_size": batch_size, "seed": seed}
    exposed = expose.expose(model, task, clean, stop=stop, epochs=epochs, lr=ascent_lr, weight_decay=weight_decay, **options)
    gates = expose.recover(exposed, task, clean, layers, alpha=alpha, epochs=recover, lr=recover_lr, momentum=momentum, **options)
    channels = [(name, c) for _, name, c in expose.lowest(gates)]
    channels = channels[: max(1, round(prune * len(channels)))]
    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:

        def zero(_: int = 0) -> None:
            expose.silence(e.params, channels)

        zero()
        e.train()
        if repair > 0:
            batches = task.batches(clean, batch_size, epochs=repair, seed=seed + 1)
            descend(e, lambda b: nll(task.forward(model, b)).mean(), batches, lr=lr, momentum=momentum, weight_decay=weight_decay, after=zero)
    return e.patch
