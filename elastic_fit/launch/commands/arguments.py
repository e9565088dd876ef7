"""How the small commands read their arguments: mistakes are UsageErrors, one line and a hint."""

from __future__ import annotations

import argparse
from typing import NoReturn

from elastic_fit.supervisor.errors import UsageError


class ArgumentParser(argparse.ArgumentParser):
    """Raises UsageError instead of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls for every mistake."""
        raise UsageError(message, hint=f"{self.prog} --help")
