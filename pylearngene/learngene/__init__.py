# SPDX-License-Identifier: Apache-2.0
"""Learngenes as objects and as folders: `Learngene`, `HostSpec`, and the list of methods a folder may name.

`gene` holds the class, `host` the kind of network, `folder` the two files, `hub` the Hugging Face Hub.
"""

from __future__ import annotations

from pylearngene.learngene.gene import Learngene, Method, register_method
from pylearngene.learngene.host import HostSpec, register_layer_kind

__all__ = ["HostSpec", "Learngene", "Method", "register_layer_kind", "register_method"]
