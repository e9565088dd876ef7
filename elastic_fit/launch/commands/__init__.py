"""One file per subcommand."""

COMMANDS = ("run", "ls", "verify", "prune", "stop", "slurm", "diff")
"""Without one of these, `run` is meant."""
