"""UCE: the keys and values of a concept's words are mapped onto those of an anchor, by one linear solve per matrix.

Paper    Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv:2308.14761.
Code     rohitgandikota/unified-concept-editing, MIT.
Forgets  concept.          Needs    forget; anchor (what to draw instead; the empty prompt without) and retain (concepts to preserve) where they are there.
Scope    keys and values of all cross-attention layers.   Forget  ridge regression of W' c_i onto W g_i: states of the concept's and the anchor's prompts.
Retain   W' r_j = W r_j on the states of retained prompts, and lam ||W' - W||^2.   Update  closed form.   Leaves  Replace.
Settings
    tokens      which states of a prompt are edited: last (of the last word that differs from the anchor's prompt), tail (from that word to the end), all
    erase       weight of the concept's pairs
    preserve    weight of the retained prompts' states, shared among them: each counts preserve / their number; 0 leaves them out
    lam         weight of staying where the weights are
    most        retained prompts at most, drawn by seed
Differs  The code solves layer by layer and encodes the texts anew in each; here texts are encoded once and the one matrix that all layers share is
         factored once. The original code pairs some 75 positions per concept, mostly padding (tokens=tail); its later version one (tokens=last).
Check
    >>> import torch; from expunge.parts.updates.ridge import Ridge
    >>> W, c, r = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    >>> Ridge([(c, 1.0), (r, 1.0)], lam=0.5).edit(W, [torch.tensor([[2.0, 4.0]]), r @ W.T]).round(decimals=6)
    tensor([[1.6032, 1.7460],
            [3.6032, 3.7460]])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split
from expunge.modalities.diffusion.task import emptied, read, states
from expunge.modalities.diffusion.trajectory import distinct, worked
from expunge.modalities.pictures import Pictures
from expunge.parts.scopes.attention import part
from expunge.parts.updates.ridge import Ridge

TOKENS = ("last", "tail", "all")


def edited(tokens: Tensor, anchors: Tensor, which: str) -> Tensor:
    """(N, L) bool: the places whose states are edited, for prompts and anchor prompts of tokens (N, L).

    >>> edited(torch.tensor([[5, 7, 0, 0]]), torch.tensor([[5, 8, 0, 0]]), "last"), edited(torch.tensor([[5, 7, 0, 0]]), torch.tensor([[5, 8, 0, 0]]), "tail")
    (tensor([[False,  True, False, False]]), tensor([[False,  True,  True,  True]]))
    """
    if which not in TOKENS:
        raise SettingError(f"tokens must be one of {', '.join(TOKENS)}, not '{which}'")
    if which == "all":
        return torch.ones_like(tokens, dtype=torch.bool)
    differs, places = tokens != anchors, torch.arange(tokens.shape[1])
    words = tokens != tokens[:, -1:]  # the last place is padding
    subject = differs & words
    last = torch.where(subject, places, -1).amax(1, keepdim=True)
    return places == last if which == "last" else (places >= last) & (last >= 0)


def pairs(model: nn.Module, task: Any, split: Split, which: str) -> tuple[Tensor, Tensor]:
    """(M, D) states c of the concept's prompts and g of the anchor's: of each one's own last word that differs (tokens=last), else at the same places."""
    forget, rows = distinct(split.forget)
    anchor = emptied(forget, task.null) if split.anchor is None else split.anchor.take(rows)
    at = edited(forget.tokens, anchor.tokens, which)
    if not bool(at.any()):
        raise SettingError("the anchor's prompts are those of the concept: name another concept to draw instead")
    worked(split.forget, forget.tokens[at.any(1)])
    there = edited(anchor.tokens, forget.tokens, which)
    there = torch.where(there.any(1, keepdim=True), there, at) if which == "last" else at
    with quiet(model):
        c, g = states(model, task.collate(split.forget, rows, None)["y"]), states(model, anchor.tokens)
        return read(model, c)[read(model, at)], read(model, g)[read(model, there)]


def preserved(model: nn.Module, retain: Pictures | None, most: int, seed: int) -> Tensor | None:
    """(P, D) states of all places of at most `most` different retained prompts."""
    if retain is None or most == 0:
        return None
    data, _ = distinct(retain)
    data = data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:most].sort().values)
    with quiet(model):
        return read(model, states(model, data.tokens)).flatten(0, 1)


@method(
    paper="arXiv:2308.14761", tasks=("diffusion",), needs=("forget",), forgets=("class",), cost=lambda n, s: (0, 0), toy={"lam": 0.1},
    place="code: trainscripts/uce_sd_erase.py, the current one",
    stable=True,
)  # fmt: skip
def uce(
    model: nn.Module, task: Any, split: Split, *, tokens: str = "last", erase: float = 1.0, preserve: float = 1.0, lam: float = 0.5, most: int = 1000,
    seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    c, g = pairs(model, task, split, tokens)
    groups, kept = [(c, erase)], preserved(model, split.retain, most if preserve else 0, seed)
    if kept is not None:
        groups.append((kept, preserve / len(kept)))
    ridge = Ridge(groups, lam)
    with edit(model, part(model, "xattn-kv")) as e, torch.no_grad():
        for W in e.params.values():
            values = [g @ W.T] + ([] if kept is None else [kept @ W.T])
            W.copy_(ridge.edit(W, values))
    return e.patch
