"""`python -m minimind <command>` is `minimind <command>`."""

from minimind.cli import main

main()
