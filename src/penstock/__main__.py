"""Run the command line: `python -m penstock` does the same as `penstock`."""

from penstock.cli.main import main

main()
