"""`python -m diffense` is the `diffense` command, for places where scripts are not on PATH."""

from diffense.cli import main

main()
