"""Many builds: on this machine, on a Ray cluster, as jobs of a scheduler."""
