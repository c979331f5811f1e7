"""Jobs that a person submits, and the Ray code under them."""

import os
import secrets
import sys
from pathlib import Path
from types import TracebackType

# Ray reads these once, when it is first imported, so they are set before any module here imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if (
    not {"RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_JOB_ID"} & os.environ.keys()
    and not Path("~/.ray/auth_token").expanduser().exists()
):
    # Left to itself, a local Ray writes a token file that others can read; a token in the environment needs none.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


# Ctrl-C while the modules of a command are imported ends it in one line, as later (pipelines.errors.run_command).
if sys.argv and (sys.argv[0] == "-m" or Path(sys.argv[0]).absolute().is_relative_to(Path(__file__).parents[1])):
    sys.excepthook = _hook
