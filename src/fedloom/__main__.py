"""`python -m fedloom` is the command `fedloom`."""

from fedloom.cli.main import main

main()
