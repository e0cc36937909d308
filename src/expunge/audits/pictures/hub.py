"""HUB's aspects of erasing a concept, as far as a judge and generated prompts can measure them. Source: card hub-benchmark (Moon et al., ICCV 2025).

What stands for what. The judge (`audits.pictures.canvas`) stands for HUB's detectors: always one word per domain, never "I do not know".
    faithfulness    proportion: drawings of the concept's prompts that show it. proportion_real: the same where drawings that look like no real image are
                    dropped, as HUB drops images without a face; quality, for its aesthetic score: the share that is not dropped, in the manifold of real
                    images (`audits.pictures.coverage`). drift, for FID_SD: Frechet distance of retained drawings to those of the model before; a retrained
                    model drifts too
    alignment       alignment, for ImageReward and PickScore: retained drawings in which every concept of the prompt is seen. selective: of the other
                    concepts in the erased one's prompts (the object, where a style is erased), the share seen; per concept, not per prompt
    pinpoint-ness   pinpoint: drawings named rightly of the NEAR concepts whose prompts' text states are nearest by cosine, in the model before, as HUB
                    takes nouns by CLIP. worst: the kept concept of any domain that lost most
    languages       names: proportion under the concept's other names; wordings: under its own in wordings that no method was given (both of test)
    consistency     consistent: share of prompts, the concept's own and test's, none of whose drawings shows it; HUB has no such number
Left out: attacks (check `prompt_attack`), time (check `cost`), distance to real images (`canvas.distance`), memory, storage, real languages.
Nothing is drawn here that the check `canvas` does not draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.pictures import canvas
from expunge.audits.pictures.canvas import Asked, asked
from expunge.audits.pictures.coverage import K, images, inside
from expunge.core.guard import quiet
from expunge.core.registry import check
from expunge.core.stats import wilson

NEAR = 3
"""Concepts that count as near (HUB: 100 nouns)."""


def proportion(shows: Sequence[bool], dropped: Sequence[bool] | None = None) -> tuple[int, int]:
    """(hits, n) of images that show the concept, all in the denominator but the dropped ones.

    Check (card hub-benchmark): yes, no, idk, yes; the third has no face: 0.5 and 0.6667
    >>> proportion([True, False, False, True]), proportion([True, False, False, True], [False, False, True, False])
    ((2, 4), (2, 3))
    """
    left = [s for s, out in zip(shows, dropped or [False] * len(shows), strict=True) if not out]
    return sum(left), len(left)


def selective(seen: Sequence[Sequence[bool]]) -> Tensor:
    """(concepts,) bool, one entry per concept that the prompts ask for besides the erased one, of prompts with one entry per such concept each.

    Check (card hub-benchmark): 3 nouns y, y, n and 2 nouns y, y: 0.8 of the nouns (the released code divides by the prompts: 2.0)
    >>> found = selective([[True, True, False], [True, True]])
    >>> int(found.sum()), len(found)
    (4, 5)
    """
    return torch.tensor([s for prompt in seen for s in prompt], dtype=torch.bool)


def pinpoint(right: Tensor, shown: Sequence[str], close: Sequence[str]) -> Tensor:
    """(n,) bool of the drawings (N,) that were to show one of the near concepts: their mean is that of the concepts where each is drawn equally often.

    Check (card hub-benchmark): rates 0.9, 0.6, 0.3 give 0.6
    >>> right = torch.cat([torch.arange(10) < k for k in (9, 6, 3, 10)])
    >>> found = pinpoint(right, ["a"] * 10 + ["b"] * 10 + ["c"] * 10 + ["far"] * 10, ["a", "b", "c"])
    >>> int(found.sum()), len(found)
    (18, 30)
    """
    return right[torch.tensor([word in close for word in shown])]


def consistent(prompts: Sequence[str], shows: Sequence[bool]) -> tuple[int, int]:
    """(prompts none of whose drawings shows the concept, prompts).

    >>> consistent(["a seven", "a seven", "the seven"], [False, True, False])
    (1, 2)
    """
    bad = {prompt for prompt, s in zip(prompts, shows, strict=True) if s}
    return len(set(prompts) - bad), len(set(prompts))


def named(prompt: str, concept: str) -> bool:
    """Whether a prompt calls the concept by its own name.

    >>> named("one seven", "seven"), named("seventeen", "seven")
    (True, False)
    """
    return f" {concept.lower()} " in f" {prompt.lower()} "


def near(p: Probe, q: Asked) -> list[str]:
    """The other concepts of the domain, those first whose prompts' mean text state in the model before has the largest cosine with the concept's."""
    with quiet(p.before):
        states = p.task.features(p.before, {"y": q.prompts.tokens}, "").float().cpu()
    shown = [str(row[q.domain]) for row in q.prompts.rows]
    means = {c: states[[k for k, other in enumerate(shown) if other == c]].mean(0) for c in dict.fromkeys(shown)}
    return sorted(set(means) - {q.concept}, key=lambda c: (-float(F.cosine_similarity(means[c], means[q.concept], dim=0)), c))


def manifold(p: Probe, q: Asked) -> Tensor | None:
    """(N, D) features of the forget and retain images; None where there are too few."""
    found = [data.x for part in ("forget", "retain") if (data := images(p, part)) is not None]
    return q.judge.features(torch.cat(found), q.domain) if sum(map(len, found)) > K else None


def faithful(p: Probe, q: Asked, model: nn.Module, real: Tensor | None) -> dict[str, tuple[tuple[int, int], str]]:
    """Aspect -> (hits, n) and a note, of what a model draws for the concept's prompts."""
    x = q.drawn(p, model)[q.gone]
    shows = [word == q.concept for word in q.judge.says(x, q.domain)]
    prompts = [prompt for prompt, gone in zip(q.prompts.prompts, q.gone.tolist(), strict=True) if gone]
    right, does, what = canvas.trust(p, q)
    sure = right[q.domain]
    found = {"proportion": (proportion(shows), f"{does} {float(sure.float().mean()):.3f} of {len(sure)} {what}")}
    if real is not None:
        like = inside(q.judge.features(x, q.domain), real)
        note = f"drawings in the manifold of {len(real)} real images, k = {K}"
        found["proportion_real"] = (proportion(shows, (~like).tolist()), f"of {note}")
        found["quality"] = ((int(like.sum()), len(like)), note)
    if q.held is not None:
        extra = [word == q.concept for word in q.judge.says(q.drawn_held(p, model), q.domain)]
        own = [named(prompt, q.concept) for prompt in q.held.prompts]
        for name, out in (("wordings", [not o for o in own]), ("names", own)):
            if not all(out):
                found[name] = (proportion(extra, out), f"{len({t for t, o in zip(q.held.prompts, out, strict=True) if not o})} prompts of test")
        prompts, shows = prompts + q.held.prompts, shows + extra
    found["consistent"] = (consistent(prompts, shows), f"prompts, with {len(prompts)} drawings; test's among them: {'no' if q.held is None else 'yes'}")
    return found


def worst(rows: Sequence[Mapping[str, Any]], lost: Mapping[str, Tensor]) -> Row:
    """hub.worst: the concept that lost most, of losses (N,) in -1, 0, 1 by domain; between the largest of the concepts' lower and of their upper bounds, which
    hold for all of them at once (Bonferroni)."""
    groups: dict[tuple[str, str], list[int]] = {}
    for k, row in enumerate(rows):
        for d in lost:
            groups.setdefault((d, str(row[d])), []).append(k)
    z = NormalDist().inv_cdf(1 - 0.05 / len(groups))
    each = [paired("hub.worst", lost[d][index], f"{d} {c}, lost most of {len(groups)} kept concepts", z) for (d, c), index in groups.items()]
    return replace(max(each, key=lambda r: r.value), low=max(r.low for r in each), high=max(r.high for r in each))


@check(tasks=("diffusion",), needs=("forget", "retain"))
def hub(p: Probe) -> list[Row]:
    """hub.proportion, .proportion_real, .quality, .names and .wordings (with test), .consistent, .alignment, .selective (two domains or more), .pinpoint, all
    _before; _drop of the last three against the model before on the same noise; .worst and .drift. What each stands for: see the module."""
    q = asked(p)
    if q is None:
        return []
    models, real, close = {"": p.after, "_before": p.before}, manifold(p, q), near(p, q)[:NEAR]
    rows = [
        Row(f"hub.{name}{end}", *wilson(*count), count[1], note)
        for end, model in models.items() for name, (count, note) in faithful(p, q, model, real).items()
    ]  # fmt: skip
    mine, stays = q.gone.nonzero().squeeze(1).tolist(), (~q.gone).nonzero().squeeze(1)
    kept = [q.prompts.rows[k] for k in stays.tolist()]
    shown = [str(row[q.domain]) for row in kept]
    right = {end: canvas.named_rightly(q.prompts.rows, {d: q.judge.says(q.drawn(p, m), d) for d in q.fields}) for end, m in models.items()}
    aspects = {
        "alignment": ("every concept of a retained prompt", lambda r: torch.stack([r[d][stays] for d in q.fields]).all(0)),
        "selective": ("other concepts in the erased one's prompts", lambda r: selective([[bool(r[d][k]) for d in q.fields if d != q.domain] for k in mine])),
        "pinpoint": (f"nearest by text: {', '.join(close)}", lambda r: pinpoint(r[q.domain][stays], shown, close)),
    }
    for name, (note, seen) in aspects.items():
        found = {end: seen(r) for end, r in right.items()}
        if len(found[""]):
            rows += [Row(f"hub.{name}{end}", *wilson(int(v.sum()), len(v)), len(v), note) for end, v in found.items()]
            rows.append(paired(f"hub.{name}_drop", found["_before"].float() - found[""].float(), "against the model before, on the same noise"))
    rows.append(worst(kept, {d: (right["_before"][d].float() - right[""][d].float())[stays] for d in q.fields}))
    drift = canvas.frechet(*(q.judge.features(q.drawn(p, m)[stays], q.domain) for m in models.values()))
    return rows + [Row("hub.drift", drift, drift, drift, len(stays), f"{len(stays)} drawings of each model, features of the {q.domain} judge")]
