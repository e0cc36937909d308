"""Multi-label classifiers: several yes-or-no answers per record."""
