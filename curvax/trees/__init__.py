"""Arithmetic on parameter pytrees, with the dtype rules and the leaf paths that the whole library uses.

Scalars never change the dtype of a leaf, inner products are accumulated in float32 or wider, and leaves are addressed
by normalised paths such as ``"encoder/0/kernel"``, the same for dicts, flax, equinox and trees with hidden leaves.
"""

from curvax.trees.arithmetic import add as add
from curvax.trees.arithmetic import add_scaled as add_scaled
from curvax.trees.arithmetic import clip as clip
from curvax.trees.arithmetic import expand_right as expand_right
from curvax.trees.arithmetic import multiply as multiply
from curvax.trees.arithmetic import ravel as ravel
from curvax.trees.arithmetic import scale as scale
from curvax.trees.arithmetic import scale_rows as scale_rows
from curvax.trees.arithmetic import sub as sub
from curvax.trees.arithmetic import unravel as unravel
from curvax.trees.arithmetic import zeros_like as zeros_like
from curvax.trees.checks import check_floating as check_floating
from curvax.trees.checks import check_like as check_like
from curvax.trees.checks import check_same_leaves as check_same_leaves
from curvax.trees.checks import floating_arrays as floating_arrays
from curvax.trees.choices import all_true as all_true
from curvax.trees.choices import choose as choose
from curvax.trees.choices import first_true as first_true
from curvax.trees.choices import select as select
from curvax.trees.choices import where as where
from curvax.trees.complex_parts import RealPair as RealPair
from curvax.trees.complex_parts import complex_like as complex_like
from curvax.trees.complex_parts import join_complex as join_complex
from curvax.trees.complex_parts import split_complex as split_complex
from curvax.trees.draws import key_aside as key_aside
from curvax.trees.draws import random_normal as random_normal
from curvax.trees.draws import random_rademacher as random_rademacher
from curvax.trees.draws import split_key as split_key
from curvax.trees.dtypes import cast_like as cast_like
from curvax.trees.dtypes import wide_dtype as wide_dtype
from curvax.trees.dtypes import wide_full as wide_full
from curvax.trees.dtypes import wide_structure as wide_structure
from curvax.trees.dtypes import wide_zero as wide_zero
from curvax.trees.dtypes import widened as widened
from curvax.trees.dtypes import wider as wider
from curvax.trees.leaves import SMALL as SMALL
from curvax.trees.leaves import Static as Static
from curvax.trees.leaves import embed as embed
from curvax.trees.leaves import example_structure as example_structure
from curvax.trees.leaves import extract as extract
from curvax.trees.leaves import is_array as is_array
from curvax.trees.leaves import is_small as is_small
from curvax.trees.leaves import leaf_paths as leaf_paths
from curvax.trees.leaves import replace_leaves as replace_leaves
from curvax.trees.leaves import size as size
from curvax.trees.leaves import split_arrays as split_arrays
from curvax.trees.leaves import structure_of as structure_of
from curvax.trees.sums import all_finite as all_finite
from curvax.trees.sums import are_finite as are_finite
from curvax.trees.sums import largest as largest
from curvax.trees.sums import largests as largests
from curvax.trees.sums import norm as norm
from curvax.trees.sums import norms as norms
from curvax.trees.sums import units as units
from curvax.trees.sums import vdot as vdot
from curvax.trees.sums import vdots as vdots
