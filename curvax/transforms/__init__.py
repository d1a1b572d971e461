"""The optimisers, one file for each method, as optax gradient transformations."""

from curvax.transforms.hessian_free import HessianFreeInfo as HessianFreeInfo
from curvax.transforms.hessian_free import HessianFreeState as HessianFreeState
from curvax.transforms.hessian_free import hessian_free as hessian_free
from curvax.transforms.levenberg_marquardt import LevenbergMarquardtInfo as LevenbergMarquardtInfo
from curvax.transforms.levenberg_marquardt import LevenbergMarquardtState as LevenbergMarquardtState
from curvax.transforms.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from curvax.transforms.levenberg_marquardt import scale_by_dense_curvature as scale_by_dense_curvature
