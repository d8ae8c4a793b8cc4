"""`python -m puzzle_trtllm` is `puzzle-trtllm`."""

from __future__ import annotations

from puzzle_trtllm.cli import main

if __name__ == "__main__":
    main()
