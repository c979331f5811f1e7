"""Where the jobs run: a cluster of real nodes on one machine, and the first steps on others."""

import pipelines  # noqa: F401  # sets how Ray authenticates, before any module here imports Ray
