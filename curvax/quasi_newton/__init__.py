"""Quasi-Newton methods of limited memory: SR1 matrices, steps with them, and minimisation of plain functions."""

from curvax.quasi_newton.minimize import MinimizeReason as MinimizeReason
from curvax.quasi_newton.minimize import minimize as minimize
from curvax.quasi_newton.sr1 import sr1_map as sr1_map
from curvax.quasi_newton.sr1 import sr1_memory as sr1_memory
from curvax.quasi_newton.sr1 import sr1_update as sr1_update
from curvax.quasi_newton.steps import SR1Step as SR1Step
from curvax.quasi_newton.steps import line_search_step as line_search_step
from curvax.quasi_newton.steps import trust_region_step as trust_region_step
