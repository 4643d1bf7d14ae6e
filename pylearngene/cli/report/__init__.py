# SPDX-License-Identifier: Apache-2.0
"""What commands show: tables, plots, an html page, and facts about the machine; no experiment runs here."""

from __future__ import annotations
