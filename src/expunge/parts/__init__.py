"""What methods are made of: losses, scopes, updates, training from scratch, low-rank adapters."""
