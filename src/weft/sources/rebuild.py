"""A compressed network back from its file."""

import copy
import os

from torch import nn

from weft import checks
from weft.sources.models import load_architecture
from weft.storage import load_into, read_metadata


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Rebuilds the network that `weft.save` wrote.

    Without a model, the source that the file records is built, without any download of weights. A source of
    the form `file.py:function` runs that function: load only files that you trust as you trust that code.

    Args:
        path: the file.
        model: the dense network that it was made of, or one of the same architecture; it is not changed.

    Returns:
        The compressed network, in evaluation mode where it was rebuilt from its source, else in the model's
        modes.

    Raises:
        ValueError: the file records no source and no model was given, or it is damaged, of another version,
            or does not fit the model.
    """
    metadata = read_metadata(path)
    if model is None:
        if not metadata["source"]:
            remedy = "pass the network, weft.load(path, model=...)"
            raise ValueError(checks.fault("model", "given", f"none, and {path} records no source", remedy))
        return load_into(load_architecture(metadata["source"]), path)
    return load_into(copy.deepcopy(model), path)
