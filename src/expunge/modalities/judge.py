"""A judge of pictures: which concept an image shows, and which concept a request erases.

A judge has no word for "nothing": a destroyed image counts as unlearned, so read what it says beside the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.guard import quiet
from expunge.modalities.classification.task import features


@dataclass(frozen=True)
class Judge:
    """Classifiers that say which concept an image shows, one per domain (style, object).

    names    domain -> its concepts, in the order of the classifier's outputs
    models   domain -> classifier (N, C, H, W) -> (N, concepts); its features are the inputs of its last linear layer
    right    domain -> (n,) bool: which held-out images it named rightly; empty for a judge that was tried on none
    size     images looked at at once
    drawings    how many of the erased concept the checks make for it, twice as many of the others; 0: GONE and KEPT
    about    what it is, for the notes of rows
    """

    names: Mapping[str, tuple[str, ...]]
    models: Mapping[str, nn.Module]
    right: Mapping[str, Tensor]
    size: int = 512
    drawings: int = 0
    about: str = ""

    def says(self, x: Tensor, domain: str) -> list[str]:
        """The concept of each image (N, C, H, W) in that domain."""
        with quiet(self._of(domain)) as model:
            found = torch.cat([model(part).argmax(1) for part in x.split(self.size)]).tolist()
        return [self.names[domain][k] for k in found]

    def features(self, x: Tensor, domain: str) -> Tensor:
        """(N, D) features of images (N, C, H, W)."""
        with quiet(self._of(domain)) as model:
            return torch.cat([features(model, {"x": part}) for part in x.split(self.size)])

    def _of(self, domain: str) -> nn.Module:
        if domain not in self.models:
            raise SettingError(f"the judge knows {', '.join(self.models)}, not '{domain}'")
        return self.models[domain]


def target(split: Any, domains: Sequence[str]) -> tuple[str, str]:
    """Domain and concept that a request erases: what all forget rows share and no retained row has. Raises SettingError when there is none, or several."""
    found = []
    for domain in domains:
        gone = {row.get(domain) for row in split.forget.rows}
        if len(gone) == 1 and gone.isdisjoint({row.get(domain) for row in split.retain.rows}):
            found.append((domain, str(next(iter(gone)))))
    if len(found) != 1:
        raise SettingError(f"the request erases {len(found)} concepts in the judge's domains ({', '.join(domains)}): exactly one is needed")
    return found[0]


def renamed(split: Any, domain: str, concept: str) -> list[int]:
    """Positions in test of prompts for the concept that forget does not hold."""
    given = {t.numpy().tobytes() for t in split.forget.tokens}
    rows = enumerate(() if split.test is None else split.test.rows)
    return [k for k, row in rows if row.get(domain) == concept and split.test.tokens[k].numpy().tobytes() not in given]
