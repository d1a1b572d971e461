"""The optimisers, one file for each method, as optax gradient transformations; what they share is in ``_step``."""

from curvax.transforms._step import StepInfo as StepInfo
from curvax.transforms._step import StepState as StepState
from curvax.transforms.cubic_step import cubic_step_of_examples as cubic_step_of_examples
from curvax.transforms.cubic_step import cubic_step_size as cubic_step_size
from curvax.transforms.cubic_step import scale_by_cubic_step as scale_by_cubic_step
from curvax.transforms.curveball import curveball as curveball
from curvax.transforms.diagonal_newton import diagonal_newton as diagonal_newton
from curvax.transforms.diagonal_newton import scale_by_diagonal_curvature as scale_by_diagonal_curvature
from curvax.transforms.ea_cg import ea_cg as ea_cg
from curvax.transforms.ea_cg import scale_by_ea_cg as scale_by_ea_cg
from curvax.transforms.empirical_fisher_diagonal import (
    scale_by_empirical_fisher_diagonal as scale_by_empirical_fisher_diagonal,
)
from curvax.transforms.hessian_free import RECIPE_A as RECIPE_A
from curvax.transforms.hessian_free import RECIPE_B as RECIPE_B
from curvax.transforms.hessian_free import RECIPE_C as RECIPE_C
from curvax.transforms.hessian_free import hessian_free as hessian_free
from curvax.transforms.iterate_averaging import average_iterates as average_iterates
from curvax.transforms.iterate_averaging import averaged_params as averaged_params
from curvax.transforms.kfac import kfac as kfac
from curvax.transforms.kfac import scale_by_kfac as scale_by_kfac
from curvax.transforms.krylov_subspace_descent import krylov_subspace_descent as krylov_subspace_descent
from curvax.transforms.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from curvax.transforms.levenberg_marquardt import scale_by_dense_curvature as scale_by_dense_curvature
from curvax.transforms.lsr1 import lsr1 as lsr1
from curvax.transforms.lsr1 import lsr1_linesearch as lsr1_linesearch
from curvax.transforms.matrix_momentum import scale_by_matrix_momentum as scale_by_matrix_momentum
from curvax.transforms.natural_gradient import natural_gradient as natural_gradient
from curvax.transforms.natural_gradient import scale_by_natural_gradient as scale_by_natural_gradient
from curvax.transforms.newton_cg import newton_cg as newton_cg
from curvax.transforms.sample_space import scale_by_sample_space as scale_by_sample_space
from curvax.transforms.sgd_qn import scale_by_sgd_qn as scale_by_sgd_qn
from curvax.transforms.step_size_adaptation import scale_by_almeida as scale_by_almeida
from curvax.transforms.step_size_adaptation import scale_by_silva_almeida as scale_by_silva_almeida
from curvax.transforms.stochastic_meta_descent import (
    scale_by_stochastic_meta_descent as scale_by_stochastic_meta_descent,
)
