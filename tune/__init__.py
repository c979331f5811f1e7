"""The search: what a run's configuration is worth, by the features that it gives."""
