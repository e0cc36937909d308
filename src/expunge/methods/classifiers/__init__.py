"""Methods for classifiers and regressors, one file per paper."""
