"""`puzzle-trtllm`, also as `python -m puzzle_trtllm`: nothing is imported before Ctrl-C ends it without a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point."""
    try:
        from puzzle_trtllm import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
