"""curvax: curvature of any JAX model as pure functions, and second-order optimisers as optax transformations."""

from curvax import trees as trees
from curvax._version import __version__ as __version__
from curvax.linear_map import Diagonal as Diagonal
from curvax.linear_map import LinearMap as LinearMap
from curvax.linear_map import from_matvec as from_matvec
