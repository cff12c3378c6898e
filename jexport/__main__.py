"""`python -m jexport`: the same as the command `jexport`."""

from jexport.cli import main

main()
