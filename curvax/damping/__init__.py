"""Damping: what is added to the curvature matrix, and how its strength, or a trust region's radius, adapts."""

from curvax.damping.matrices import Damping as Damping
from curvax.damping.matrices import proportional as proportional
from curvax.damping.matrices import scale_sensitive as scale_sensitive
from curvax.damping.matrices import tikhonov as tikhonov
from curvax.damping.rules import BestOfThree as BestOfThree
from curvax.damping.rules import DampingRule as DampingRule
from curvax.damping.rules import RadiusRule as RadiusRule
from curvax.damping.rules import cubic_rule as cubic_rule
from curvax.damping.rules import curveball_rule as curveball_rule
from curvax.damping.rules import kfac_rule as kfac_rule
from curvax.damping.rules import next_batch_radius_rule as next_batch_radius_rule
from curvax.damping.rules import next_batch_rule as next_batch_rule
from curvax.damping.structural import LayerOutputs as LayerOutputs
from curvax.damping.structural import structural as structural
