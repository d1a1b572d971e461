"""The optimisers, one file for each method, as optax gradient transformations."""

from curvax.transforms.levenberg_marquardt import LevenbergMarquardtInfo as LevenbergMarquardtInfo
from curvax.transforms.levenberg_marquardt import LevenbergMarquardtState as LevenbergMarquardtState
from curvax.transforms.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from curvax.transforms.levenberg_marquardt import scale_by_dense_curvature as scale_by_dense_curvature
