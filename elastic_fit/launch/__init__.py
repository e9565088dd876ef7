"""Outside the workers: the command."""
