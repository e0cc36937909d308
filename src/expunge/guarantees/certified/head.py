"""A softmax head over frozen features that deletes with a certificate: a few more noisy steps on what stays, and a bound on what is left.

    head = fit(features, labels, ids, epsilon=1.0, delta=1e-5)
    head.plan([17, 42])               # steps and epsilon, before anything runs
    certificate = head.forget([17, 42])
    head.release("head.safetensors")  # weights and certificate, no record

What epsilon and delta bound. Deletion: nobody who sees the published head can tell it from one trained from scratch without any of the records deleted so
far (same settings, as many steps in all), but for a factor e^epsilon and a slip of delta. Learning: the same for any `group` records that are still there,
against a head that never had them, for whoever saw every head published so far. Both hold whatever the attacker else knows, the other records included.

Requests are of one of two kinds, settled before learning:
  fixed      (adaptive=0) what is asked does not depend on published heads. Any number of requests; each takes as many steps as the history needs.
  adaptive   (adaptive=p) at most p requests of at most `group` records, each made in full view of the heads published before. A deleted record may then live on
             in what others asked to delete, so that steps alone help no further: the noise is set so that all p + 1 published heads together stay
             within (epsilon, delta), for records that stay and records that go. Request p + 1 is refused.

State is the published weights, the records that stay (bounded features, labels, ids) and the ids of those that went. No gradients, no older weights.
Why rows are bounded and gradients not clipped, and which noise is secure: `parts.updates.noisy`. The bounds: `guarantees.certified.renyi`.

Paper    Chourasia, Shah, Forget Unlearning: Towards True Data-Deletion in Machine Learning, ICML 2023, arXiv 2210.08911.
Differs  Bounded rows in place of clipped gradients; the noise is the least that deletes `group` records in `deletion_steps` steps, not a setting to search for;
         only the epsilon of the bound that is proven in `guarantees.certified.renyi` is certified, the paper's is reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core.errors import DataError, ModelError, SettingError, SplitError
from expunge.guarantees.certified import files
from expunge.guarantees.certified.certificate import Certificate, Phase, Settings, certify, check, deletion_epsilon, least_sigma, least_steps
from expunge.parts.updates import noisy


@dataclass(frozen=True)
class Plan:
    """What a request will do: records removed, ids that had gone before, steps, epsilon after them; `retrain` is how many steps learning anew takes."""

    records: int
    before: int
    steps: int
    epsilon: float
    retrain: int


@dataclass
class Head:
    """A certified head: what was published (`weights`, `certificate`) and the records that stay. Made by `fit` and `load`.

    weights   (C, D) float64, the bias as last column where there is one
    x, y, ids (n, D) bounded features, (n,) labels, (n,) ids of the records that stay
    gone      ids that were deleted
    """

    weights: Tensor
    certificate: Certificate
    x: Tensor
    y: Tensor
    ids: Tensor
    gone: tuple[int, ...] = ()
    noise: noisy.Noise = field(default_factory=noisy.secure)
    clip: float = math.inf

    def predict(self, features: Tensor) -> Tensor:
        """(N,) labels of features (N, F), which are bounded as those of training were."""
        return predict(self.weights, self.certificate.settings, features)

    def plan(self, ids: Iterable[int]) -> Plan:
        """What `forget(ids)` would do; nothing runs. Raises as `forget` does."""
        return self._plan(ids)[0]

    def _plan(self, ids: Iterable[int]) -> tuple[Plan, Tensor, tuple[int, ...]]:
        asked = set(ids.tolist() if isinstance(ids, Tensor) else (int(i) for i in ids))
        if not asked:
            raise SplitError("the request names no record")
        before, now = asked & set(self.gone), asked & set(self.ids.tolist())
        if unknown := asked - before - now:
            raise SplitError(f"{len(unknown)} of {len(asked)} ids were never in this head, the first is {min(unknown)}; nothing was deleted")
        c = self.certificate
        if not now:
            return Plan(0, len(before), 0, c.epsilon, c.settings.steps), torch.ones(len(self.ids), dtype=torch.bool), ()
        stays = ~torch.isin(self.ids, torch.tensor(sorted(now)))
        if not stays.any():
            raise SplitError("the request deletes every record: nothing is left to learn from; delete the head instead")
        s, left = c.settings, int(stays.sum())
        after = lambda K: (*c.history, Phase(K, left, len(now)))  # noqa: E731
        steps = s.deletion_steps if s.adaptive else least_steps(s, after)
        check(s, after(steps))
        epsilon = s.epsilon if s.adaptive else deletion_epsilon(s, after(steps))
        return Plan(len(now), len(before), steps, epsilon, s.steps), stays, tuple(sorted(now))

    def forget(self, ids: Iterable[int]) -> Certificate:
        """Delete these records: remove them from the store, take the steps planned, publish the last iterate. Returns the new certificate.

        Ids that were deleted before are left alone; a request of such ids alone changes nothing and returns the certificate in force. Either the whole
        request is done or nothing: raises SplitError for unknown ids and for a request of every record, SettingError where no certificate could be given.
        """
        plan, stays, now = self._plan(ids)
        if not now:
            return self.certificate
        c = self.certificate
        s, x, y = c.settings, self.x[stays], self.y[stays]
        history = (*c.history, Phase(plan.steps, len(x), len(now)))
        w, done = noisy.run(self.weights, x, y, eta=s.eta, lam=s.lam, sigma=s.sigma, steps=plan.steps, noise=self.noise, clip=self.clip)
        certificate = certify(s, history, [done], self.noise.name if c.noise == "secure" else "seeded")
        old, self.gone = self.x, (*self.gone, *now)
        self.weights, self.certificate, self.x, self.y, self.ids = w, certificate, x, y, self.ids[stays]
        old.zero_()  # the head's own copy: nothing of it is left in memory
        return certificate

    def linear(self) -> nn.Linear:
        """The head as a layer of float64 over features whose rows are at most `radius` long."""
        s = self.certificate.settings
        layer = nn.Linear(self.weights.shape[1] - s.bias, s.classes, bias=s.bias, dtype=torch.double)
        with torch.no_grad():
            layer.weight.copy_(self.weights[:, : layer.in_features])
            if s.bias:
                layer.bias.copy_(self.weights[:, -1])
        return layer

    def save(self, path: str | Path, key: bytes | None = None) -> Path:
        """The working file: published weights, certificate and the records that stay, which are personal data. With `key`, signed by HMAC-SHA256. Write it
        over the older one after each request: an older one holds what was deleted since."""
        tensors = {"weights": self.weights, "x": self.x, "y": self.y, "ids": self.ids}
        return files.store(path, "head", self.certificate, tensors, key, gone=list(self.gone), clip=None if self.clip == math.inf else self.clip)

    def release(self, path: str | Path, key: bytes | None = None) -> Path:
        """The file to publish: weights and certificate, and no record. Raises SettingError for seeded noise, which whoever has the seed can take off."""
        if self.certificate.noise != "secure":
            raise SettingError("no release: this head has seeded noise, which is for tests; fit without a seed for noise from the system's generator")
        return files.store(path, "release", self.certificate, {"weights": self.weights}, key)


def fit(
    features: Tensor, labels: Tensor, ids: Tensor, *, epsilon: float, delta: float, lam: float = 0.01, radius: float = 1.0, bias: bool = True, steps: int = 0,
    deletion_steps: int = 0, group: int = 1, adaptive: int = 0, sigma: float = 0.0, eta: float = 0.0, clip: float = math.inf, batch_size: int = 0,
    classes: int = 0, seed: int | None = None, model: nn.Module | None = None,
) -> Head:  # fmt: skip
    """Learn a certified head of features (N, F), labels (N,) 0..C-1 and ids (N,), which name each record for good.

    epsilon, delta   what a deletion is held to; delta 1e-10..1/N
    lam              weight of the penalty: larger forgets faster and needs less noise, and fits less
    radius           longer rows are scaled onto it. Fix it, and any scaling of features, without looking at the records: neither is in the bound
    steps            of learning, K_A; 0: ceil(4 / (eta lam)), after which 2 % of the start is left
    deletion_steps   a request for which sigma is chosen, 0: a tenth of steps. Other requests take what they need; adaptive ones take these
    group            records of one request for which sigma is chosen, and of one person in `Certificate.learning`
    adaptive         how many requests may depend on published heads; 0: none does
    sigma            noise; 0: the least for epsilon, delta, group and deletion_steps
    eta              step size; 0: 1 / (lam + beta), the largest
    clip             norm at which each record's gradient is clipped, and then M: with two classes alone; inf: not needed, rows are bounded
    batch_size       records per step: fewer than all are refused
    classes          C; 0: one more than the largest label
    seed             noise that can be repeated, for tests; None: from the system's generator, which a release asks for
    model            the layer that is to be certified, where there is one: anything but nn.Linear over these features is refused. Its weights are not read

    Raises DataError for data that do not fit or features that carry a gradient, ModelError for a model that is not linear, SettingError for settings
    without a certificate.
    """
    classes = classes or (int(labels.max()) + 1 if len(labels) else 0)
    _check_data(features, labels, ids, classes)
    if model is not None:
        _check_model(model, features.shape[1], classes)
        bias = getattr(model, "bias", None) is not None
    n = len(features)
    if batch_size and batch_size < n:
        raise SettingError(f"no certificate: batches of {batch_size} of {n} records; the bound needs all of them in every step (batch_size=0)")
    if not 0 < radius < math.inf:
        raise SettingError(f"no certificate: radius must be larger than 0 and finite, not {radius}: rows must be bounded")
    if adaptive < 0 or steps < 0 or deletion_steps < 0 or eta < 0 or sigma < 0 or not lam > 0 or not clip > 0:
        raise SettingError("no certificate: lam and clip must be larger than 0; steps, deletion_steps, adaptive, eta and sigma not below 0")
    R = math.sqrt(radius**2 + bias)
    M, beta = noisy.constants(R)
    if clip < M and classes > 2:
        raise SettingError(f"no certificate: clipping at {clip:g} with {classes} classes may carry two heads apart; rows are bounded instead (leave clip out)")
    eta = eta or 1 / (lam + beta)
    steps = steps or math.ceil(4 / (eta * lam))
    s = Settings(
        epsilon, delta, group, adaptive, classes, radius, bias, R, min(M, clip), beta, lam, eta, sigma or 1.0, steps, deletion_steps or math.ceil(steps / 10)
    )
    check(s if sigma else replace(s, adaptive=0), (Phase(steps, n),))
    s = s if sigma else replace(s, sigma=least_sigma(s, n))
    noise = noisy.secure() if seed is None else noisy.seeded(seed)
    x, y = noisy.bounded(features, radius, bias), labels.detach().long().to(features.device, copy=True)
    check(s, history := (Phase(steps, n),))
    w = noisy.start((classes, x.shape[1]), eta, lam, s.sigma, noise).to(x.device)
    w, done = noisy.run(w, x, y, eta=eta, lam=lam, sigma=s.sigma, steps=steps, noise=noise, clip=clip)
    return Head(w, certify(s, history, [done], noise.name), x, y, ids.detach().long().cpu().clone(), (), noise, clip)


def predict(weights: Tensor, s: Settings, features: Tensor) -> Tensor:
    """(N,) labels by weights (C, D) of features (N, F)."""
    return (noisy.bounded(features, s.radius, s.bias) @ weights.mT).argmax(-1)


def load(path: str | Path, key: bytes | None = None, seed: int | None = None) -> Head:
    """Read a file that `Head.save` wrote. Later requests draw their noise from the system's generator, or from `seed`, which turns the certificate to `seeded`.

    Raises ModelError for a file that is damaged, changed, of another kind or version, or not signed by `key`.
    """
    body, t, certificate = files.read(path, "head", {"weights", "x", "y", "ids"}, key)
    x, s = t["x"], certificate.settings
    _check_data(x, t["y"], t["ids"], s.classes)
    if (
        len(x) != certificate.n
        or x.shape[1] != t["weights"].shape[1]
        or float(x.norm(dim=1).max()) > s.R * (1 + 1e-9)
        or len(body["gone"]) != certificate.deleted
    ):
        raise ModelError(f"{Path(path).name} holds other records than its certificate speaks of")
    noise = noisy.secure() if seed is None else noisy.seeded(seed)
    return Head(t["weights"], certificate, x, t["y"], t["ids"], tuple(body["gone"]), noise, math.inf if body["clip"] is None else body["clip"])


def load_release(path: str | Path, key: bytes | None = None) -> tuple[Tensor, Certificate]:
    """(weights, certificate) of a file that `Head.release` wrote, for `predict`. Raises ModelError as `load` does."""
    _, t, certificate = files.read(path, "release", {"weights"}, key)
    return t["weights"], certificate


def _check_data(features: Tensor, labels: Tensor, ids: Tensor, classes: int) -> None:
    if features.requires_grad:
        raise DataError(
            "features require grad: their extractor is not frozen, and a certificate of the head says nothing of it; extract them under torch.no_grad()"
        )
    if features.ndim != 2 or not features.is_floating_point() or len(features) < 2:
        raise DataError(f"features must be real numbers of shape (N, F) with N of 2 or more, not {tuple(features.shape)} {features.dtype}")
    if not bool(torch.isfinite(features).all()):
        raise DataError("features hold a number that is not finite")
    for name, t in (("labels", labels), ("ids", ids)):
        if t.shape != features.shape[:1] or t.dtype not in (torch.int64, torch.int32):
            raise DataError(f"{name} must be {len(features)} whole numbers, not {tuple(t.shape)} {t.dtype}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(f"labels must be 0 to {classes - 1}; found {int(labels.min())} to {int(labels.max())}")
    if len(ids.unique()) < len(ids):
        raise DataError(f"{len(ids) - len(ids.unique())} ids occur twice: each record needs its own")


def _check_model(model: nn.Module, width: int, classes: int) -> None:
    if not isinstance(model, nn.Linear):
        raise ModelError(
            f"no certificate: {type(model).__name__} is not nn.Linear; the bound holds for a linear head over frozen features, so extract them and fit on those"
        )
    if (model.in_features, model.out_features) != (width, classes):
        raise ModelError(f"the layer maps {model.in_features} features to {model.out_features} classes, the data have {width} and {classes}")
