"""Certified deletion: noisy gradient descent on a linear head over frozen features, with a bound on what is left of a deleted record."""
