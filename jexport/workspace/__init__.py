"""A run's work folder, locks, memory and threads."""
