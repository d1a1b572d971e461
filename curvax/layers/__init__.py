"""Layer taps: the structure of any JAX model, found in its program, and what is worked out from it."""

from curvax.layers.blocks import Block as Block
from curvax.layers.diagonals import empirical_fisher_diagonal as empirical_fisher_diagonal
from curvax.layers.diagonals import exact_ggn_diagonal as exact_ggn_diagonal
from curvax.layers.diagonals import sampled_ggn_diagonal as sampled_ggn_diagonal
from curvax.layers.ekfac import EigenCorrected as EigenCorrected
from curvax.layers.ekfac import eigenvalue_corrections as eigenvalue_corrections
from curvax.layers.factors import KroneckerFactors as KroneckerFactors
from curvax.layers.factors import average_factors as average_factors
from curvax.layers.factors import damped_factors as damped_factors
from curvax.layers.factors import factors_over_batches as factors_over_batches
from curvax.layers.factors import kronecker_factors as kronecker_factors
from curvax.layers.factors import zero_factors as zero_factors
from curvax.layers.find import Layer as Layer
from curvax.layers.find import Layers as Layers
from curvax.layers.find import find_layers as find_layers
from curvax.layers.hessian import layer_hessian as layer_hessian
from curvax.layers.kronecker import EigenKroneckerMap as EigenKroneckerMap
from curvax.layers.kronecker import KroneckerMap as KroneckerMap
from curvax.layers.kronecker import kronecker_map as kronecker_map
from curvax.layers.per_example import gradient_inner_products as gradient_inner_products
from curvax.layers.per_example import gradient_norms as gradient_norms
from curvax.layers.per_example import per_example_gradients as per_example_gradients
from curvax.layers.sample_space import gram as gram
from curvax.layers.taps import TappedPoint as TappedPoint
from curvax.layers.taps import tap as tap
