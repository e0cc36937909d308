"""Certified deletion: noisy gradient descent on a linear head over frozen features, with a bound on what is left of a deleted record.

h = fit(features, labels, ids, epsilon=2.0, delta=1e-4); h.forget([17]); h.release("head.safetensors")
"""

from expunge.guarantees.certified.certificate import Certificate, Settings, certify
from expunge.guarantees.certified.head import Head, fit, load, load_release

__all__ = ["Certificate", "Head", "Settings", "certify", "fit", "load", "load_release"]
