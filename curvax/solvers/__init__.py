"""Iterative and exact solvers of linear systems and trust-region problems on pytrees."""

from curvax.krylov.conjugate_gradient import cg as cg
from curvax.krylov.conjugate_gradient import geometric_iterations as geometric_iterations
from curvax.krylov.monitors import Monitor as Monitor
from curvax.krylov.monitors import lookback_monitor as lookback_monitor
from curvax.krylov.monitors import reduction_monitor as reduction_monitor
from curvax.krylov.stop_reasons import StopReason as StopReason
from curvax.solvers.backtracking import Choice as Choice
from curvax.solvers.backtracking import backtrack as backtrack
from curvax.solvers.backtracking import best_stored as best_stored
from curvax.solvers.backtracking import choose_and_search as choose_and_search
from curvax.solvers.backtracking import last_stored as last_stored
from curvax.solvers.krylov_subspace import krylov_subspace as krylov_subspace
from curvax.solvers.krylov_subspace import minimize_in_subspace as minimize_in_subspace
from curvax.solvers.line_search import backtracking_line_search as backtracking_line_search
from curvax.solvers.lissa import lissa as lissa
from curvax.solvers.preconditioners import diagonal_preconditioner as diagonal_preconditioner
from curvax.solvers.steihaug import steihaug as steihaug
from curvax.solvers.trust_region import compact_trust_region as compact_trust_region
from curvax.solvers.trust_region import dense_trust_region as dense_trust_region
from curvax.solvers.trust_region import diagonal_trust_region as diagonal_trust_region
