"""`bimask-study COMMAND ...`: the same as `python -m study.COMMAND ...`."""

from __future__ import annotations

import runpy
import sys

COMMANDS = ("launch", "compare", "protocol", "victims", "report", "promote", "purify", "score", "serve")


def main() -> None:
    """Run the command that the first word names, with the words behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("-h", "--help"):
        print(f"usage: bimask-study {{{','.join(COMMANDS)}}} ...; each has its own --help")
        return
    if name not in COMMANDS:
        said = "no command" if name is None else repr(name)
        print(f"error: got {said}; give one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"bimask-study {name}", *sys.argv[2:]]
    runpy.run_module(f"study.{name}", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
