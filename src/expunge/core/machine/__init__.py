"""What a machine has, and what of it a run may take."""
