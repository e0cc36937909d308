"""A verdict as page, table and pictures."""
