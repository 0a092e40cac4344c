"""`python -m pumice.cli`, which `accelerate launch -m` starts in several processes."""

from __future__ import annotations

from pumice.cli import main

if __name__ == "__main__":
    main()
