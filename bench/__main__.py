"""List the programs of this package, or run one of them.

python -m bench             # lists them
python -m bench NAME ...    # the same as `python -m bench.NAME ...`
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path


def programs() -> dict[str, str]:
    """Return the first line of each program's docstring by its name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        if "\ndef main(" in text and not path.name.startswith("__"):
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    """Run the named program, or print the list."""
    if len(sys.argv) == 1:
        print("python -m bench NAME [--help]\n")
        print(*(f"  {name:<16} {title}" for name, title in programs().items()), sep="\n")
        return
    name = sys.argv.pop(1)
    if name not in programs():
        raise SystemExit(f"unknown program {name!r}; expected one of: {', '.join(programs())}")
    sys.argv[0] = f"python -m bench {name}"
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
