"""The exit status of a command, which reports an error that the caller can fix in one line."""

import os
import sys
from collections.abc import Callable

from kdhooks.errors import KDHooksError

_INTERRUPTED = 130  # as shells report a process that Ctrl-C has ended


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command, and return its status, 0 by default; or 2 after an error, 130 after Ctrl-C."""
    try:
        return command() or 0
    except KDHooksError as error:
        print(f"kdhooks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # On a new line, since the terminal shows ^C, and progress may be shown, on the present one.
        print("\nkdhooks: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
