"""Regressors: real-valued targets."""
