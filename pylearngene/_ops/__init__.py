# SPDX-License-Identifier: Apache-2.0
"""The registered operators: schemas, implementations per device, fake kernels and autograd formulas.

Everything here is below the public door: arguments are already checked. Importing the package registers the operators.
"""

from pylearngene._ops import expansion as expansion
from pylearngene._ops import expansion_conv as expansion_conv
from pylearngene._ops import expansion_formulas as expansion_formulas

__all__ = ["expansion", "expansion_conv", "expansion_formulas"]
