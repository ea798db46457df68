"""Errors that a user can act on: one line that names the argument, its value and what is accepted."""

from __future__ import annotations


class DiffsampError(ValueError):
    """Bad input. The message is one line and fit to be shown without a traceback."""
