"""A run as a thing on disk: its settings, where it starts, checkpoints, records and figures."""
