"""Measurements that print a table and write JSON. They stand outside: nothing imports them."""

import pipelines  # noqa: F401  # sets how Ray authenticates, before any module here imports Ray
