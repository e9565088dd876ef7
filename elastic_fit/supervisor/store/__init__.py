"""Checkpoints on disk: manifest, commit, verify, select, retention."""
