"""Losses: pure functions from one forward pass to one number per example."""

from expunge.losses.forget import ascent, random_labels, relabel
from expunge.losses.retain import kl, kl_to, nll

__all__ = ["ascent", "kl", "kl_to", "nll", "random_labels", "relabel"]
