"""The search: what a run's configuration is worth, by the features that it gives."""

import pipelines  # noqa: F401  sets what Ray reads once, when it is first imported, as any module here may do
