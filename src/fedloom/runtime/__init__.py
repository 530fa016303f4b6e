"""Where effects are performed."""
