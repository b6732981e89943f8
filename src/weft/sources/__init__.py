"""Where models and data come from: `load_model("torchvision:resnet18")`, `load_data("digits")`."""

from weft.sources.data import Data, load_data
from weft.sources.models import load_architecture, load_model, load_weights, read_tensors
from weft.sources.rebuild import load
from weft.sources.reference import Reference

__all__ = [
    "Data",
    "Reference",
    "load",
    "load_architecture",
    "load_data",
    "load_model",
    "load_weights",
    "read_tensors",
]
