"""The texts that builds calibrate on and validate with."""
