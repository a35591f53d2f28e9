"""The frozen teacher: its configuration, one run's session, its cache and its files."""
