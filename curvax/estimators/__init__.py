"""Traces, diagonals and spectra of linear maps that are known by their products only."""

from curvax.estimators.becker_lecun import becker_lecun_diagonal as becker_lecun_diagonal
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal as chapelle_erhan_diagonal
from curvax.estimators.curvature_propagation import propagate_curvature as propagate_curvature
from curvax.estimators.curvature_propagation import sampled_hessian_diagonal as sampled_hessian_diagonal
from curvax.estimators.diagonals import hutchinson_diagonal as hutchinson_diagonal
from curvax.estimators.diagonals import secant_ratios as secant_ratios
from curvax.estimators.eigenpairs import top_eigenpairs as top_eigenpairs
from curvax.estimators.gradient_flow import gradient_norms_by_lag as gradient_norms_by_lag
from curvax.estimators.gradient_flow import jacobian_norms_by_lag as jacobian_norms_by_lag
from curvax.estimators.gradient_flow import layer_norms as layer_norms
from curvax.estimators.gradient_flow import newton_boosts as newton_boosts
from curvax.estimators.spectra import spectral_density as spectral_density
from curvax.estimators.traces import hutch_plus_plus as hutch_plus_plus
from curvax.estimators.traces import hutchinson_trace as hutchinson_trace
from curvax.estimators.traces import slq_logdet as slq_logdet
from curvax.estimators.traces import xtrace as xtrace
from curvax.krylov.functions import slq_trace as slq_trace
from curvax.krylov.lanczos import gauss_quadrature as gauss_quadrature
from curvax.krylov.lanczos import lanczos as lanczos
