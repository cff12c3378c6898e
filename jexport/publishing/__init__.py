"""From an artifact to a registry and back, with its signature."""
