# SPDX-License-Identifier: Apache-2.0
"""`python -m pylearngene`, the same as the command `pylearngene`."""

from __future__ import annotations

from pylearngene.cli import main

if __name__ == "__main__":
    main()
