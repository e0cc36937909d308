"""Methods and audits compared on worlds."""
