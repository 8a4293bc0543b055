"""Run the command line: `python -m penstock` does the same as `penstock`."""

from __future__ import annotations

import sys

from penstock.cli.signals import survive_signals


def main() -> None:
    """Prepare for signals, then load everything else, which takes half a second."""
    survive_signals(sys.argv[1:])
    from penstock.cli.main import main as run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
