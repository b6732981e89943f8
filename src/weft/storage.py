"""Files: one safetensors file per network, its plan as JSON in the metadata, no pickle anywhere.

The metadata of a file written by `save`:

    format          "weft"
    format_version  "1", or "2" where tensors are entropy-coded
    plan            JSON: {layer name: {"names": [...], "structure": {...}, "shape": [...]}}
    aliases         JSON: {tensor name: the name under which the shared tensor is stored}
    source          the model source that rebuilds the dense network, "torchvision:resnet18", or empty
    weights         the file of the dense network's weights, for comparisons, or empty

    coding          JSON, in version 2: {tensor name: [dtype, shape]} of the tensors that are entropy-coded

A network may also be a folder of such files, each with a part of it, and `model.safetensors.index.json`,
which says where every tensor is.

The tensors are those of the network's state dict, shared ones once. A coded one is a row of bytes, as
`weft.numerics.entropy_coding` writes them, and carries a checksum.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from weft import checks
from weft.checkpoint import INDEX, listed
from weft.layers.base import StructuredLayer
from weft.layers.replace import dense_weight, refusal, replace_layer
from weft.numerics.entropy_coding import DamagedError, check_coder, decode_tensor, encode_tensor
from weft.structures import from_json
from weft.structures.base import StructuredMatrix

FORMAT_VERSION = "1"
CODED_VERSION = "2"  # a reader that knows only version 1 would take the codes for tensors

_DAMAGED = "the file is damaged: write it again with weft.save"


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Writes a file beside its place and renames it, so that it is never there half-written.

    Args:
        path: where the file shall be; its folder must exist.
        write: writes the whole file to the path that it is given.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        remedy = "create the folder first"
        raise FileNotFoundError(checks.fault("path", "in an existing folder", target, remedy))
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        write(beside)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        beside.replace(target)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()
    return target


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file beside its place and renames it.

    Args:
        path: where the file shall be.
        text: the contents.

    Returns:
        The path.
    """
    return write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike[str], key: str, remedy: str) -> dict[str, Any]:
    """Reads a JSON file of ours.

    Args:
        path: the file.
        key: the key that tells its kind; its value is the format version, 1.
        remedy: how such a file is made.

    Returns:
        The data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or of another kind or version.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(checks.fault("path", "an existing file", file, remedy))
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(checks.fault(str(file), "JSON", f"'{error}'", remedy)) from error
    if not isinstance(data, dict) or data.get(key) != 1:
        got = sorted(data)[:5] if isinstance(data, dict) else type(data).__name__
        raise ValueError(checks.fault(str(file), f'JSON with "{key}": 1', got, remedy))
    return data


def structured_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The structured layers of a network, those that share one matrix under the first one's name.

    Args:
        model: the network.

    Returns:
        First name -> all names, in the network's order.
    """
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredLayer):
            groups.setdefault(id(module.matrix), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def coder_of(entropy_coding: bool | str) -> str | None:
    """The coder that `save` uses, checked to be at hand.

    A missing package is an ImportError, an unknown coder a ValueError.

    Args:
        entropy_coding: False for none, True for range coding, or a coder's name.

    Returns:
        The coder's name, or None.
    """
    if entropy_coding is False:
        return None
    coder = "range" if entropy_coding is True else entropy_coding
    check_coder(coder)
    return coder


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: str = "",
    weights: str = "",
    entropy_coding: bool | str = False,
    asked: str = "",
    commands: Sequence[str] = (),
) -> Path:
    """Writes a network into one safetensors file, beside its place and then renamed.

    A state dict that holds something other than tensors is a TypeError.

    Args:
        model: the network, compressed or not.
        path: the file to write.
        source: the model source that rebuilds the dense network, such as "torchvision:resnet18" or
            "file.py:function"; recorded so that `weft.load` needs no model.
        weights: the file of the dense network's weights, where the source does not bring them.
        entropy_coding: whether every tensor is stored in as few bits as its symbols' frequencies allow, bit
            for bit the same when loaded: True or "range" needs the extra weft[entropy], here and where it is
            loaded; "huffman" needs nothing and takes a percent or two more.
        asked: what was asked for, such as the budget; recorded for the report.
        commands: the commands that made the file, likewise.

    Returns:
        The path.

    Examples:
        >>> import tempfile, torch, weft
        >>> from weft.structures.low_rank import LowRank
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> small, _ = weft.compress(model, {"0": LowRank(rank=2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = weft.save(small, f"{folder}/small.safetensors")
        ...     again = weft.load(path, model=model)
        >>> torch.equal(again(torch.ones(1, 8)), small(torch.ones(1, 8)))
        True
    """
    coder = coder_of(entropy_coding)
    tensors, aliases = _unique_tensors(model)
    plan = {
        first: plan_entry(names, _matrix(model, first)) for first, names in structured_layers(model).items()
    }
    more = {"asked": asked, "commands": json.dumps(list(commands))} if asked or commands else {}
    return write_network(
        path, tensors, plan, aliases=aliases, source=source, weights=weights, coder=coder, more=more
    )


def plan_entry(names: Sequence[str], matrix: StructuredMatrix) -> dict[str, Any]:
    """What a file says of a structured layer.

    Args:
        names: all layers that share the matrix.
        matrix: the matrix.

    Returns:
        JSON-ready data.
    """
    return {"names": list(names), "structure": matrix.structure.to_json(), "shape": list(matrix.shape)}


def write_network(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    plan: Mapping[str, dict[str, Any]],
    *,
    aliases: Mapping[str, str] | None = None,
    source: str = "",
    weights: str = "",
    coder: str | None = None,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Writes a network, or a part of one, from its tensors.

    Args:
        path: the file to write.
        tensors: those to store, contiguous.
        plan: what `plan_entry` says of the structured layers, by their first names.
        aliases: further names of stored tensors.
        source: the model source.
        weights: the file of the dense network's weights.
        coder: the entropy coder; None for none.
        more: further metadata.

    Returns:
        The path.
    """
    metadata = {
        "format": "weft",
        "format_version": FORMAT_VERSION,
        "plan": json.dumps(plan),
        "aliases": json.dumps(aliases or {}),
        "source": source,
        "weights": weights,
        **(more or {}),
    }
    if coder is not None:
        tensors, coding = _coded(tensors, coder)
        metadata |= {"format_version": CODED_VERSION, "coding": json.dumps(coding, separators=(",", ":"))}
    return write_beside(path, lambda beside: save_file(tensors, beside, metadata))


def _coded(tensors: Mapping[str, Tensor], coder: str) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """The tensors, those coded that get shorter by it, and what decodes them."""
    stored: dict[str, Tensor] = {}
    coding: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        data = encode_tensor(tensor, coder)
        entry = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        if len(data) + len(name) + len(str(entry)) < tensor.nbytes:
            stored[name], coding[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8), entry
        else:
            stored[name] = tensor
    return stored, coding


def _decoded(tensors: dict[str, Tensor], coding: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Undoes `_coded`."""
    decoded = dict(tensors)
    for name, entry in coding.items():
        try:
            kind, shape = entry
            dtype = getattr(torch, kind)
            decoded[name] = decode_tensor(tensors[name].numpy().tobytes(), dtype, shape)
        except (DamagedError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            got = f"'{error}'"
            raise ValueError(checks.fault(f"tensor {name} of {file}", "whole", got, _DAMAGED)) from error
    return decoded


def _matrix(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name).matrix


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every shared tensor once, contiguous, and the other names of shared ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            remedy = "override get_extra_state or remove it before saving"
            raise TypeError(
                checks.fault(f"state dict entry {name}", "a tensor", type(value).__name__, remedy)
            )
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and same in first_names:
            aliases[name] = first_names[same]
        else:
            first_names[same] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks what a file says about itself, as `load` does.

    Args:
        path: a file that `save` wrote.

    Returns:
        "plan" and "aliases" as dictionaries, "source" and "weights" as text.
    """
    metadata, _ = _read(path, with_tensors=False)
    return metadata


def _read(
    path: str | os.PathLike[str], *, with_tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = Path(path)
    index = file / INDEX if file.is_dir() else file
    if index.suffix == ".json" and index.is_file():
        return _read_shards(index, with_tensors=with_tensors)
    if not file.is_file():
        got = f"a folder without {INDEX}" if file.is_dir() else file
        raise FileNotFoundError(checks.fault("path", "an existing file", got, "check the name"))
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            if with_tensors:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        remedy = "the file is truncated or damaged: write it again with weft.save"
        raise ValueError(checks.fault(str(file), "a whole safetensors file", f"'{error}'", remedy)) from error
    if metadata.get("format") != "weft":
        got = f"format {metadata.get('format')!r}"
        raise ValueError(
            checks.fault(str(file), "a file written by weft.save", got, "load it as plain weights")
        )
    version = metadata.get("format_version")
    if version not in {FORMAT_VERSION, CODED_VERSION}:
        expected = f"of format version {FORMAT_VERSION} or {CODED_VERSION}"
        remedy = "use the weft that wrote it, or write it again"
        raise ValueError(checks.fault(str(file), expected, f"version {version!r}", remedy))
    if version == CODED_VERSION and with_tensors:
        tensors = _decoded(tensors, _dictionary(metadata, "coding", file), file)
    return {**metadata, **{name: _dictionary(metadata, name, file) for name in ("plan", "aliases")}}, tensors


def _read_shards(index: Path, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parts of a network together."""
    places = listed(index)
    whole: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        metadata, own = _read(shard, with_tensors=with_tensors)
        for name in ("plan", "aliases"):
            metadata[name] = {**whole.get(name, {}), **metadata[name]}
        whole = metadata
        tensors |= own
    parts = checks.missing_and_surplus(tensors, places) if with_tensors else []
    if parts:
        raise ValueError(checks.fault(f"tensors of {index}", "those listed", "; ".join(parts), _DAMAGED))
    return whole, tensors


def _dictionary(metadata: Mapping[str, str], name: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(name, ""))
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        got = repr(metadata.get(name))
        raise ValueError(checks.fault(f"metadata {name} of {file}", "a JSON dictionary", got, _DAMAGED))
    return value


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Rebuilds the network that `save` wrote, from the dense network that it was made of.

    Args:
        model: a network of the same architecture, its weights arbitrary; it is changed in place.
        path: the file.

    Returns:
        The model with its layers replaced and all its tensors read.

    Raises:
        ValueError: the file is damaged, or a layer or tensor is missing, surplus or of a shape that does not
            fit. The model may then be changed in part.
    """
    metadata, tensors = _read(path)
    aliases: Mapping[str, str] = metadata["aliases"]
    owner = f"of {path}"
    for first, entry in metadata["plan"].items():
        try:
            names = _with_ties(model, entry["names"])
            shape, structure = tuple(entry["shape"]), from_json(entry["structure"])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"layer {first} {owner}: {reason}") from error
        _check_layers(model, names, shape, owner)
        prefix = f"{first}.matrix." if first else "matrix."
        own = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        own |= {
            name.removeprefix(prefix): tensors[stored]
            for name, stored in aliases.items()
            if name.startswith(prefix) and stored in tensors
        }
        try:
            matrix = structure.from_tensors(shape, own)
        except ValueError as error:
            raise ValueError(f"layer {first} {owner}: {error}") from error
        model = replace_layer(model, names, matrix)
    _assign(model, tensors, aliases, owner)
    return model


def _with_ties(model: nn.Module, names: list[str]) -> list[str]:
    """Layers, and those that the model ties to them: a checkpoint holds a shared weight under one name."""
    layers = dict(model.named_modules(remove_duplicate=False))
    weights = [layers[name]._parameters.get("weight") for name in names if name in layers]  # noqa: SLF001
    shared = {id(weight) for weight in weights if weight is not None}
    tied = [name for name, layer in layers.items() if id(layer._parameters.get("weight")) in shared]  # noqa: SLF001
    return list(dict.fromkeys([*names, *tied]))


def _check_layers(model: nn.Module, names: list[str], shape: tuple[int, ...], owner: str) -> None:
    remedy = "load it into the dense network it was made from"
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            if any(isinstance(held, nn.MultiheadAttention) for held in model.modules()):
                remedy = "pass the network as weft.split_attention(model) leaves it"
            raise ValueError(
                checks.fault(f"layer {name} {owner}", "a layer of the model", "none", remedy)
            ) from error
        weight = dense_weight(module)
        if weight is None:
            reason = refusal(module) or f"{type(module).__name__} holds no weight of this kind"
            got = f"one that stays dense, because {reason}"
            raise ValueError(checks.fault(f"layer {name} {owner}", "one that can be replaced", got, remedy))
        if tuple(weight.shape) != shape:
            got = f"{tuple(weight.shape)} in the model"
            raise ValueError(checks.fault(f"layer {name} {owner}", f"of shape {shape}", got, remedy))


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], owner: str) -> None:
    """Puts every stored tensor into its place; tied parameters stay tied because only their data change."""
    places = model.state_dict(keep_vars=True)
    remedy = "load it into the network it was made from"
    given = {**{name: name for name in tensors}, **aliases}
    # A checkpoint holds what the model ties under one of its names.
    owners = {id(place): name for name, place in places.items() if name in given}
    given |= {
        name: given[owners[id(place)]]
        for name, place in places.items()
        if name not in given and id(place) in owners
    }
    parts = checks.missing_and_surplus(given, places)
    if parts:
        raise ValueError(checks.fault(f"tensors {owner}", "those of the model", "; ".join(parts), remedy))
    for name, place in places.items():
        stored = tensors[given[name]]
        if stored.shape != place.shape:
            got = f"{tuple(stored.shape)} in the file"
            raise ValueError(
                checks.fault(f"tensor {name} {owner}", f"of shape {tuple(place.shape)}", got, remedy)
            )
    held = {
        name
        for name, _ in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    with torch.no_grad():
        for name, place in places.items():
            stored = tensors[given[name]].to(place.device)
            if name in held:
                place.data = stored
            else:  # what a module gives as its extra state is no place but a copy
                model.get_submodule(name.rpartition(".")[0]).set_extra_state(stored)
