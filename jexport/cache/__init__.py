"""The stage cache: finished results, found by what decides them."""
