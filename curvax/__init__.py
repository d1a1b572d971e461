"""curvax: curvature of any JAX model as pure functions, and second-order optimisers as optax transformations."""

from curvax import damping as damping
from curvax import estimators as estimators
from curvax import losses as losses
from curvax import solvers as solvers
from curvax import testing as testing
from curvax import trees as trees
from curvax._version import __version__ as __version__
from curvax.curvature_point import CurvaturePoint as CurvaturePoint
from curvax.linear_map import Diagonal as Diagonal
from curvax.linear_map import LinearMap as LinearMap
from curvax.linear_map import from_matvec as from_matvec
from curvax.objective import Objective as Objective
from curvax.products import empirical_fisher as empirical_fisher
from curvax.products import fisher as fisher
from curvax.products import ggn as ggn
from curvax.products import hessian as hessian
from curvax.products import over_batches as over_batches
from curvax.quadratic_model import QuadraticModel as QuadraticModel
from curvax.quadratic_model import model_lower_bound as model_lower_bound
from curvax.quadratic_model import quadratic_model as quadratic_model
from curvax.quadratic_model import reduction_ratio as reduction_ratio
from curvax.term import Term as Term
from curvax.transforms import hessian_free as hessian_free
from curvax.transforms import levenberg_marquardt as levenberg_marquardt
from curvax.transforms import scale_by_dense_curvature as scale_by_dense_curvature
