"""What stages made, kept by what decided it."""
