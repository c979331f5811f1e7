"""Errors that a user can mend, and the edge of every command that shows them as one line."""

import io
import os
import signal
import sys
from collections.abc import Callable

from mae_core.names import printable

FAILED, USAGE_ERROR, DIVERGED = 1, 2, 3
"""Exit codes of commands; one that was asked to stop has 128 and the signal's number."""


class UserError(ValueError):
    """Wrong input, said in one line that names the thing, what was found and what to do."""


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's ``main`` and exits: 2 with one line on stderr for what the user can mend.

    Args:
        main: The command; what it returns is the exit code (None means 0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is shown escaped, and ends no command.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except SystemExit as stop:  # --help
        code = stop.code
    except BrokenPipeError:
        # Whoever read the output has enough of it, as `| head` does: ended without a word, as other programs are.
        _print_nowhere()
        code = 0 if {"--help", "-h"} & set(sys.argv) else 128 + signal.SIGPIPE
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = USAGE_ERROR
    except OSError as error:
        # A full disk, a folder without permission: the system's words and the path say it all.
        if error.errno is None:
            raise
        where = f": {printable(str(error.filename))}" if error.filename else ""
        print(f"error: {os.strerror(error.errno)}{where}", file=sys.stderr)
        code = USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
        # Where it came while such code ran as dataclasses make theirs by, Python would end by the signal at its very
        # end, whatever the code; the next such code makes it forget that.
        exec("")
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _print_nowhere()
    sys.exit(code)


def _print_nowhere() -> None:
    """Sends what is still to be printed nowhere: nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
