# SPDX-License-Identifier: Apache-2.0
"""pylearngene: compact genes from which the weights of many networks are synthesized, on the fly.

One algebra: `W[l] = sum_k c[l, k] R_out[k] G_k R_in[k]^T`. Gene-backed layers compute with such weights without ever
holding them, in the forward and in the backward pass.

Shape letters, everywhere: `B` samples, `M` tokens (flattened leading axes of x), `O` out, `I` in, `K` genes,
`R` rank, `P, Q` gene height and width, `L` layers, `*` any leading axes.
"""

import torch as _torch  # noqa: F401  (first, so that its OpenMP runtime is the only one)

from pylearngene import data, errors, functional, hosts, methods, nn, training
from pylearngene import pretrained as _pretrained  # noqa: F401  (gives models of transformers their saving)
from pylearngene._backends import BackendReport, backends, set_backend, use_backend
from pylearngene._version import __version__
from pylearngene.learngene import Learngene
from pylearngene.memory import MemoryEstimate, estimate_memory
from pylearngene.networks import auxiliary, bake, descend, extract, set_depth
from pylearngene.plan import set_regime
from pylearngene.sharding import fully_shard_genes
from pylearngene.summary import Summary, summary
from pylearngene.trainable import freeze, param_groups

__all__ = [
    "BackendReport",
    "Learngene",
    "MemoryEstimate",
    "Summary",
    "__version__",
    "auxiliary",
    "backends",
    "bake",
    "data",
    "descend",
    "errors",
    "estimate_memory",
    "extract",
    "freeze",
    "fully_shard_genes",
    "functional",
    "hosts",
    "methods",
    "nn",
    "param_groups",
    "set_backend",
    "set_depth",
    "set_regime",
    "summary",
    "training",
    "use_backend",
]
