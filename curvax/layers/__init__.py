"""Layer taps: the structure of any JAX model, found in its program."""

from curvax.layers.find import Layer as Layer
from curvax.layers.find import Layers as Layers
from curvax.layers.find import find_layers as find_layers
from curvax.layers.taps import Captured as Captured
from curvax.layers.taps import TappedPoint as TappedPoint
from curvax.layers.taps import tap as tap
