"""What curvax is tested with, public so that others can test against it: oracles, problems, operation counts."""

from curvax.testing.operations import count_operations as count_operations
from curvax.testing.operations import flops as flops
from curvax.testing.oracles import case_gradients as case_gradients
from curvax.testing.oracles import dense_empirical_fisher as dense_empirical_fisher
from curvax.testing.oracles import dense_fisher as dense_fisher
from curvax.testing.oracles import dense_ggn as dense_ggn
from curvax.testing.oracles import dense_hessian as dense_hessian
from curvax.testing.oracles import dense_output_matrix as dense_output_matrix
from curvax.testing.problems import PROBLEMS as PROBLEMS
from curvax.testing.problems import Problem as Problem
from curvax.testing.problems import problem as problem
