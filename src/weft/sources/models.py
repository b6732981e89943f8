"""Trained networks by name: the user's own file, torchvision, timm, Hugging Face; weights from a file."""

import difflib
import inspect
import pickle
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weft import checks
from weft.checks import fault
from weft.layers.attention import split_attention
from weft.sources.archive import numeric_tensor, read_arrays
from weft.sources.reference import (
    FILE_PREFIX,
    Reference,
    call_function,
    existing_file,
    first_line,
    optional_package,
    parse,
)


def load_model(source: str, weights: str | Path | None = None) -> nn.Module:
    """Builds a network from its source, in evaluation mode, every `nn.MultiheadAttention` split into layers.

    Sources:

    - `path/to/file.py:function`: the function is called without arguments and returns the module; the file's
      own folder is importable meanwhile. The module comes as the function made it, but for its attentions.
    - `torchvision:NAME[?random][?weights=ENTRY][&num_classes=N]`: a classification, segmentation, ... model
      of `torchvision.models`, with its default pretrained weights or with the named entry of its weights
      enumeration.
    - `timm:NAME[?random][&num_classes=N]`: a model of timm with its pretrained weights.
    - `hf:NAME_OR_DIR[?random][&num_labels=N]`: a transformers model; its class is the one that the
      configuration's `architectures` names, or `AutoModel` where it names none that transformers has.

    The last three download pretrained weights. With `weights=` or with `?random` nothing is downloaded but,
    for `hf:` with a name, the configuration; `?random` initialises with the seed 0, `?random=7` with 7.

    Args:
        source: where the network comes from.
        weights: a file to load afterwards, as `load_weights` reads it.

    Returns:
        The network; a user's function that returns no module is a TypeError.

    Examples:
        >>> load_model("alexnet")
        Traceback (most recent call last):
        ValueError: model must be one of hf:..., timm:..., torchvision:..., path/to/file.py:function,
        got 'alexnet'; check its spelling
    """
    if weights is not None:
        weights = existing_file("weights", weights)  # before a network is built or downloaded in vain
    model = _build(source, pretrained=weights is None)
    if weights is not None:
        load_weights(model, weights)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_lazy(parameter) and not parameter.is_meta:
            checks.finite(f"parameter {name} of {source}", parameter.detach())
    return split_attention(model).eval()


def load_architecture(source: str) -> nn.Module:
    """Builds a network as `load_model` does, but without downloading pretrained weights.

    Args:
        source: as for `load_model`.

    Returns:
        The network; its weights are to be loaded.
    """
    return split_attention(_build(source, pretrained=False)).eval()


def _build(source: str, *, pretrained: bool) -> nn.Module:
    """The network as its source makes it; a TypeError where that is none."""
    reference = parse("model", source, MODEL_SOURCES)
    model = MODEL_SOURCES[reference.prefix](reference, pretrained)
    if not isinstance(model, nn.Module):
        got = "its class rather than an instance" if inspect.isclass(model) else type(model).__name__
        expected = f"an nn.Module as the return value of {source}"
        raise TypeError(fault("model", expected, got, "return the module from the function"))
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file of weights into a network that has exactly these tensors.

    The file is read by `read_tensors`. Where the plain names do not fit, a prefix that every name carries
    (`module.` of data parallel training, `_orig_mod.` of torch.compile) is taken off. `num_batches_tracked`
    may be missing, which only a batch norm without momentum reads, and so may all but one of several names of
    one tied tensor. Floating tensors are converted to the network's own type.

    Args:
        model: the network; untouched where the file does not fit.
        path: the file.

    Raises:
        ValueError: tensors are missing or surplus, or have another shape; they are listed by name.
    """
    tensors = read_tensors(path)
    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    while not expected.keys() & tensors.keys() and (prefix := _common_prefix(tensors)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    given = {id(expected[name]) for name in tensors if name in expected}
    missing = [
        name
        for name, tensor in expected.items()
        if name not in tensors and id(tensor) not in given and not name.endswith("num_batches_tracked")
    ]
    surplus = [name for name in tensors if name not in expected]
    owner = type(model).__name__
    if missing or surplus:
        parts = [
            f"{len(names)} {word} ({_listed(names)})"
            for word, names in (("missing", missing), ("surplus", surplus))
            if names
        ]
        remedy = "give the weights of this architecture, or the architecture of these weights"
        got = f"{path} with {' and '.join(parts)}"
        raise ValueError(fault("weights", f"exactly the {len(expected)} tensors of {owner}", got, remedy))
    wrong = [
        f"{name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        got = f"{path} with {_listed(wrong)}"
        remedy = "give the weights of this architecture"
        raise ValueError(fault("weights", f"of the shapes that {owner} has", got, remedy))
    mistyped = [
        f"{name} {tensor.dtype} for {expected[name].dtype}"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    if mistyped:
        got = f"{path} with {_listed(mistyped)}"
        raise ValueError(
            fault("weights", "floating where the model is", got, "dequantise them before saving")
        )
    model.load_state_dict(tensors, strict=False)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads the named tensors of a weights file, whose kind its suffix tells.

    - `.safetensors`;
    - `.npz`: arrays of numbers, without pickles;
    - `.pt`, `.pth`, `.bin`, `.ckpt`, `.tar`: what `torch.save` wrote of a state dict, read with
      `weights_only=True`; also a checkpoint that holds it under "state_dict", "model_state_dict" or "model".

    Args:
        path: the file.

    Returns:
        Its tensors by name.

    Raises:
        ValueError: the suffix is unknown, the file is truncated, or it holds something other than tensors.
    """
    path = existing_file("weights", path)
    reader = WEIGHT_READERS.get(path.suffix.lower())
    if reader is None:
        expected = f"a file that ends in {', '.join(WEIGHT_READERS)}"
        raise ValueError(fault("weights", expected, str(path), "save the state dict as safetensors"))
    return reader(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged("safetensors", path, error) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    arrays = read_arrays("weights", path)
    return {name: numeric_tensor(f"array {name} of {path}", array) for name, array in arrays.items()}


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        got = f"{path}, which is damaged or holds pickled objects"
        remedy = "save model.state_dict() alone, best as safetensors"
        raise ValueError(fault("weights", "a state dict of tensors", got, remedy)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged("torch", path, error) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    strangers = (
        [name for name, value in content.items() if not isinstance(value, Tensor)]
        if isinstance(content, Mapping)
        else [type(content).__name__]
    )
    if strangers:
        got = f"{path} with {_listed(strangers)}"
        raise ValueError(fault("weights", "a state dict of tensors", got, "save model.state_dict() alone"))
    return dict(content)


def _damaged(kind: str, path: Path, error: BaseException) -> ValueError:
    got = f"{path} ({first_line(error)})"
    return ValueError(fault("weights", f"a complete {kind} file", got, "copy or download it again"))


WEIGHT_READERS: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".tar"), _read_torch),
}
"""Which function reads a weights file of which suffix."""


def _common_prefix(names: Collection[str]) -> str:
    known = ("module.", "_orig_mod.")
    return next((prefix for prefix in known if names and all(name.startswith(prefix) for name in names)), "")


def _listed(names: Iterable[object], most: int = 6) -> str:
    shown = [str(name) for name in names]
    rest = f", and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest


def _from_file(reference: Reference, pretrained: bool) -> object:
    return call_function("model", reference)


def _from_torchvision(reference: Reference, pretrained: bool) -> object:
    options = reference.options({"random": _seed, "weights": str, "num_classes": int})
    models = optional_package("torchvision", "vision").models
    _known_name("torchvision", reference.place, models.list_models())
    sizes = {"num_classes": options["num_classes"]} if "num_classes" in options else {}
    if "random" in options or not pretrained:
        return _seeded(
            options.get("random", 0), lambda: models.get_model(reference.place, weights=None, **sizes)
        )
    entry = options.get("weights", "DEFAULT")
    entries = models.get_model_weights(reference.place).__members__
    if entry != "DEFAULT":
        checks.one_of(f"weights of {reference.source!r}", entry, list(entries))
    if not entries:
        remedy = "give --weights FILE, or write ?random"
        raise ValueError(fault("model", "one with pretrained weights", repr(reference.source), remedy))
    return _downloaded(reference, lambda: models.get_model(reference.place, weights=entry, **sizes))


def _from_timm(reference: Reference, pretrained: bool) -> object:
    options = reference.options({"random": _seed, "num_classes": int})
    timm = optional_package("timm", "vision")
    if "hf_hub:" not in reference.place and "/" not in reference.place:
        _known_name("timm", reference.place.partition(".")[0], timm.list_models())
    sizes = {"num_classes": options["num_classes"]} if "num_classes" in options else {}
    if "random" in options or not pretrained:
        return _seeded(
            options.get("random", 0), lambda: timm.create_model(reference.place, pretrained=False, **sizes)
        )
    return _downloaded(reference, lambda: timm.create_model(reference.place, pretrained=True, **sizes))


def _from_hugging_face(reference: Reference, pretrained: bool) -> object:
    options = reference.options({"random": _seed, "num_labels": int})
    transformers = optional_package("transformers", "text")
    sizes = {"num_labels": options["num_labels"]} if "num_labels" in options else {}
    configuration = _downloaded(
        reference,
        lambda: transformers.AutoConfig.from_pretrained(reference.place, **sizes),
        "give a folder that holds the model's config.json",
    )
    # The architecture that the weights were saved from has all their tensors, its head included; AutoModel
    # has none.
    named: list[str] = getattr(configuration, "architectures", None) or []
    known = [found for name in named if (found := getattr(transformers, name, None)) is not None]
    if "random" in options or not pretrained:
        build = known[0] if known else transformers.AutoModel.from_config
        return _seeded(options.get("random", 0), lambda: build(configuration))
    build = (known[0] if known else transformers.AutoModel).from_pretrained
    return _downloaded(reference, lambda: build(reference.place, config=configuration))


MODEL_SOURCES: Mapping[str, Callable[[Reference, bool], object]] = {
    FILE_PREFIX: _from_file,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hugging_face,
}
"""For every prefix of a model source the function that builds it, with pretrained weights or without."""


def _seed(text: str) -> int:
    return int(text or "0")


def _seeded(seed: int, build: Callable[[], object]) -> object:
    # A random network is the same one each time, and torch's global generator goes on as if nothing had
    # happened.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _known_name(package: str, name: str, known: Collection[str]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=5)
    remedy = f"did you mean {', '.join(close)}?" if close else f"see {package}'s list_models()"
    raise ValueError(fault("model", f"one of {package}'s {len(known)} models", repr(name), remedy))


def _downloaded(reference: Reference, build: Callable[[], Any], remedy: str = "") -> Any:
    # torchvision, timm and transformers each raise their own kinds of error where a file is not to be had:
    # urllib's, the hub's, OSError. Whatever it was, the remedy is the same.
    try:
        return build()
    except Exception as error:
        got = f"{type(error).__name__}: {first_line(error)}"
        remedy = remedy or f"give --weights FILE, or write {reference.prefix}:{reference.place}?random"
        remedy = f"check the name and the connection, or {remedy}"
        argument = f"pretrained model {reference.source!r}"
        raise ConnectionError(fault(argument, "at hand or possible to download", got, remedy)) from error
