r"""How fast stochastic second-order methods converge near a minimum: the asymptotic theory, as functions.

All is about the iteration

    theta_{k+1} = theta_k - alpha_k B^{-1} (grad h(theta_k) + noise)
    h(theta) = 1/2 (theta - theta*)^T H (theta - theta*)

with noise that is independent from step to step, has no mean, and has the constant covariance Sigma. Arguments are
dense symmetric matrices of one shape (n, n) that go by the same names throughout:

============  ==============================================================================================
``hessian``   H, positive definite
``curvature`` B, positive definite: the matrix that the method inverts; I for SGD
``noise``     Sigma, positive semi-definite: the covariance of the gradient, that of one example over the batch size
``rate``      alpha, where it is constant; ``rates`` alpha_0 ... alpha_{K-1}, where it need not be
``start``     theta_0 - theta*, not random
``step``      k, the number of updates behind theta_k
============  ==============================================================================================

K = B^{-1} H decides what converges, lambda_1(K) >= ... >= lambda_n(K) are its eigenvalues, and h_0 = h(theta_0) -
h(theta*). Every function can be jitted, mapped by ``vmap`` and differentiated, by H and B where the eigenvalues of K
are simple; it works in the widest dtype of its matrices, float32 at least. Outside of the validity that its docstring
gives the result is nan.

The source of what has no other is Martens 2016, section 5.7 and appendix A. What is false there as printed stands here
corrected, and its docstring says so; most of it comes from a covariance recursion without its term of second order in
alpha (equation A.1). With a constant rate one substitution repairs all that it says of large k: B - (alpha / 2) H in
the place of B. The theory wants a constant Sigma, which least squares and networks do not have: theirs depends on
theta.
"""

from curvax.theory.annealing import Expansion as Expansion
from curvax.theory.annealing import RealisableBounds as RealisableBounds
from curvax.theory.annealing import annealed_covariance as annealed_covariance
from curvax.theory.annealing import annealed_loss as annealed_loss
from curvax.theory.annealing import bordes_bounds as bordes_bounds
from curvax.theory.annealing import gradient_noise_bounds as gradient_noise_bounds
from curvax.theory.annealing import newton_noise_bounds as newton_noise_bounds
from curvax.theory.annealing import realisable_noise_bounds as realisable_noise_bounds
from curvax.theory.averaging import averaged_covariance_limit as averaged_covariance_limit
from curvax.theory.averaging import averaged_loss_bound as averaged_loss_bound
from curvax.theory.averaging import averaged_loss_limit as averaged_loss_limit
from curvax.theory.averaging import averaged_moments as averaged_moments
from curvax.theory.averaging import flammarion_bach_bound as flammarion_bach_bound
from curvax.theory.averaging import sharp_averaged_loss_bound as sharp_averaged_loss_bound
from curvax.theory.iteration import Bounds as Bounds
from curvax.theory.iteration import ExpectedLoss as ExpectedLoss
from curvax.theory.iteration import Moments as Moments
from curvax.theory.iteration import constant_rate_bounds as constant_rate_bounds
from curvax.theory.iteration import constant_rate_moments as constant_rate_moments
from curvax.theory.iteration import moments as moments
from curvax.theory.iteration import stationary_covariance as stationary_covariance
from curvax.theory.iteration import stationary_loss as stationary_loss
from curvax.theory.lyapunov import TraceBounds as TraceBounds
from curvax.theory.lyapunov import lyapunov_trace_bounds as lyapunov_trace_bounds
from curvax.theory.lyapunov import pseudo_lyapunov_trace as pseudo_lyapunov_trace
from curvax.theory.lyapunov import solve_lyapunov as solve_lyapunov
from curvax.theory.lyapunov import stationary_lyapunov as stationary_lyapunov
from curvax.theory.lyapunov import trace_product_bounds as trace_product_bounds
