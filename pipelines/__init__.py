"""Jobs that a person submits, and the Ray code under them."""

import os
import secrets
from pathlib import Path

# Ray reads these once, when it is first imported, so they are set before any module here imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if (
    not {"RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_JOB_ID"} & os.environ.keys()
    and not Path("~/.ray/auth_token").expanduser().exists()
):
    # Left to itself, a local Ray writes a token file that others can read; a token in the environment needs none.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
