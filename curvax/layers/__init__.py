"""Layer taps: the structure of any JAX model, found in its program."""

from curvax.layers.find import Layer as Layer
from curvax.layers.find import Layers as Layers
from curvax.layers.find import find_layers as find_layers
from curvax.layers.find import find_layers_at as find_layers_at
from curvax.layers.taps import Captured as Captured
from curvax.layers.taps import LayerOutputs as LayerOutputs
from curvax.layers.taps import TappedPoint as TappedPoint
from curvax.layers.taps import tap as tap
from curvax.layers.taps import tap_at as tap_at
