"""Errors that the command line shows as one line, with the exit status each one ends with."""

from __future__ import annotations


class EvalError(Exception):
    """An evaluation that cannot go on. The message is one line for the user, without a traceback."""

    exit_status = 1


class UsageError(EvalError):
    """Something the user asked for cannot be done as asked: a name, a file, a value."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message (with what follows where that line only announces it)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines) if lines[0].endswith(":") else lines[0]
