"""Losses: pure functions from one forward pass to one number per example."""

from expunge.parts.losses.forget import ascent, random_labels, relabel
from expunge.parts.losses.retain import kl, kl_to, nll

__all__ = ["ascent", "kl", "kl_to", "nll", "random_labels", "relabel"]
