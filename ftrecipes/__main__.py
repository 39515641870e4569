"""`python -m ftrecipes` is `ftr`."""

from ftrecipes.cli import main

main()
