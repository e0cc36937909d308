"""Requests over records in files, for modalities of records: models from factories, readers, selectors."""
