"""What signatures call the arguments of the library."""

from typing import Any

import jax

PyTree = Any
Scalar = Any
Array = jax.Array
