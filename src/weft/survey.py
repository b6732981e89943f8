"""What a network consists of: layers, shapes, costs, and the second moments of what flows through them."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weft import checks
from weft.checkpoint import WEIGHTS, Checkpoint, StoredTensor
from weft.layers.replace import dense_weight, geometry_of_layer, looks_up, refusal
from weft.measure import (
    Batch,
    batch_size,
    call,
    call_checked,
    class_scores,
    device_of,
    evaluating,
    logits_of,
    network_cost,
    slow_attention_path,
    to_device,
)
from weft.numerics.gram import DEFAULT_SHRINKAGE, MomentFile, add_products, alone, full_precision, mapped
from weft.progress import track
from weft.storage import read_json, write_beside, write_text
from weft.structures.base import (
    BlockDiagonalGram,
    Candidate,
    Cost,
    DenseGram,
    DiagonalGram,
    Geometry,
    Gram,
    matrix_shape,
)

# Wider inputs get a diagonal Gram: a square one in float64 would take more than 2 GiB.
WIDEST_DENSE_GRAM = 16384
# Patches of a convolution, and rows of a linear layer, are multiplied in pieces of at most this many numbers.
PIECE = 2**24
# A matrix that belongs to no layer is named where it holds at least this share of the parameters.
WORTH_TELLING = 0.01

_GRAM_KINDS: dict[str, type[Any]] = {
    "dense": DenseGram,
    "blocks": BlockDiagonalGram,
    "diagonal": DiagonalGram,
}


@dataclass(frozen=True)
class LayerSurvey:
    """One weight of the network; layers that share it are one entry.

    Attributes:
        name: the first layer's name.
        names: all layers that share the weight.
        weight: the weight itself (not a copy); shape (outputs, inputs) or (outputs, channels / groups,
            *kernel).
        geometry: the convolution's, its input size known after a survey with batches; None for a linear
            layer.
        applications: how often the matrix is applied to a vector (a row of an embedding looked up) per
            sample, on average; 0 where no data came by.
        lookup: whether rows are looked up, in an embedding that no linear layer shares. Its output Gram holds
            how often; its input Gram, with `loss` or `teacher`, what the entries of a row matter.
        input_gram: the metric on inputs (patches for a convolution); None without batches.
        output_gram: the metric on outputs; None without `loss` or `teacher`.
        mean_input: the mean input vector (patch); None without batches.
        mean_output: the mean output vector; None without batches.
        stored: where the weight lies, for a checkpoint without a model; `weight` then has shape and dtype
            alone (it is on the device "meta"), and `read` gives the rest.
    """

    name: str
    names: tuple[str, ...]
    weight: Tensor = field(repr=False, compare=False)
    geometry: Geometry | None = None
    applications: float = 0.0
    lookup: bool = False
    input_gram: Gram | None = field(default=None, repr=False, compare=False)
    output_gram: Gram | None = field(default=None, repr=False, compare=False)
    mean_input: Tensor | None = field(default=None, repr=False, compare=False)
    mean_output: Tensor | None = field(default=None, repr=False, compare=False)
    stored: StoredTensor | None = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.weight.shape)

    @property
    def calls(self) -> float:
        """How often the layer is called per sample; vectors per sample for a linear layer."""
        if self.geometry is None or self.geometry.input_size is None:
            return self.applications
        return self.applications / self.geometry.positions(self.shape[2:])

    @property
    def cost(self) -> Cost:
        """The dense weight's cost; multiply-adds per sample, 0 where no data came by."""
        count = self.weight.numel()
        products = 0 if self.lookup else round(count * self.applications)
        return Cost(count, count * self.weight.element_size(), products)

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        for role in ("weight", "mean_input", "mean_output"):
            if state[role] is not None and not state[role].is_meta:
                state[role] = alone(state[role])
        return state

    def read(self) -> "LayerSurvey":
        """The same with its weight, where that lies in a checkpoint; to be forgotten soon after.

        Returns:
            The layer itself where it has its weight.
        """
        return self if self.stored is None else replace(self, weight=self.stored.read(), stored=None)

    def release(self) -> None:
        """Drops what the Grams kept for the next fit."""
        for gram in (self.input_gram, self.output_gram):
            if gram is not None:
                gram.release()

    def per_sample(self, cost: Cost) -> Cost:
        """A structure's cost in this layer.

        Args:
            cost: as `StructuredMatrix.cost(geometry)` gives it, with this layer's geometry.

        Returns:
            The same with multiply-adds per sample of the network; 0 for a lookup, whose few rows are formed
            at a cost that no family states. `measure` counts them.
        """
        return replace(cost, multiply_adds=0 if self.lookup else round(cost.multiply_adds * self.calls))

    def per_sample_point(self, point: Candidate) -> Candidate:
        """A candidate with its cost in this layer.

        Args:
            point: its cost as `per_sample` takes it.

        Returns:
            The same with multiply-adds per sample of the network.
        """
        return replace(point, cost=self.per_sample(point.cost))


@dataclass(frozen=True)
class Survey:
    """What a network consists of.

    Attributes:
        layers: the weights that can be replaced, by the first layer's name.
        left_dense: layers that stay as they are, with the reason, worded to follow "left dense, because".
        total: the whole network's cost.
        samples: how many samples of calibration data came by; 0 without batches.
    """

    layers: dict[str, LayerSurvey]
    left_dense: dict[str, str]
    total: Cost
    samples: int = 0

    def __str__(self) -> str:
        counts = f"{self.total.parameters:,} parameters, {self.total.bytes:,} bytes"
        adds = f", {self.total.multiply_adds:,} multiply-adds" if self.total.multiply_adds else ""
        rows = [
            (
                " = ".join(layer.names),
                "x".join(map(str, layer.shape)),
                f"{layer.cost.parameters:,} parameters",
            )
            for layer in self.layers.values()
        ]
        return "\n".join([
            f"a network with {counts}{adds}, of which can be replaced",
            *in_columns(rows),
            *(f"{name} left dense, because {reason}" for name, reason in self.left_dense.items()),
        ])

    def to_json(self) -> dict[str, Any]:
        """The summary: everything but weights and second moments.

        Returns:
            JSON-ready data.
        """
        return {
            "weft_survey": 1,
            "samples": self.samples,
            "total": asdict(self.total),
            "layers": {
                name: {
                    "names": list(layer.names),
                    "shape": list(layer.shape),
                    "dtype": str(layer.weight.dtype).removeprefix("torch."),
                    "geometry": None if layer.geometry is None else asdict(layer.geometry),
                    "applications": layer.applications,
                    "cost": asdict(layer.cost),
                    "input_gram": None if layer.input_gram is None else type(layer.input_gram).__name__,
                    "output_gram": None if layer.output_gram is None else type(layer.output_gram).__name__,
                }
                for name, layer in self.layers.items()
            },
            "left_dense": self.left_dense,
        }

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        source: str = "",
        weights: str = "",
        shards: Sequence[str] = (),
        commands: Sequence[str] = (),
    ) -> Path:
        """Writes the summary as JSON, and the second moments beside it as safetensors.

        Args:
            path: the JSON file; the moments go to the same name with `.safetensors`.
            source: the model source, recorded for the next verb.
            weights: the file of its weights, likewise.
            shards: in the place of both a checkpoint's folder and its layers' names, as `survey_shards` takes
                them.
            commands: what made it, recorded for the report.

        Returns:
            The JSON file's path.

        Raises:
            ValueError: the name is that of the moments' file.
        """
        target = Path(path)
        if target.suffix == ".safetensors":
            expected = "a JSON file's name, the moments' file beside it ends in .safetensors"
            raise ValueError(checks.fault("path", expected, target, "call it e.g. survey.json"))
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            for role in ("input_gram", "output_gram"):
                gram = getattr(layer, role)
                if gram is not None:
                    kind = next(key for key, known in _GRAM_KINDS.items() if type(gram) is known)
                    tensors[f"{name}|{role}|{kind}"] = gram.moment.contiguous()
                    tensors[f"{name}|{role}|ridge"] = torch.tensor(gram.ridge, dtype=torch.float64)
            for role in ("mean_input", "mean_output"):
                mean = getattr(layer, role)
                if mean is not None:
                    tensors[f"{name}|{role}|vector"] = mean.contiguous()
        if tensors:
            write_beside(target.with_suffix(".safetensors"), lambda beside: save_file(tensors, beside))
        origin = {"source": source, "weights": weights, "shards": list(shards), "commands": list(commands)}
        summary = {**self.to_json(), **origin, "moments": bool(tensors)}
        return write_text(target, json.dumps(summary, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> "Survey":
        """Reads what `save` wrote, both files, and joins it with the model's weights.

        Args:
            path: the JSON file.
            model: the surveyed model.

        Returns:
            The survey.

        Raises:
            ValueError: it is damaged, no survey, or one of another model; the first layer that differs is
                named.
        """
        summary = read_json(path, "weft_survey", "write it with weft survey")
        try:
            return cls._from_summary(summary, Path(path), model)
        except (KeyError, TypeError) as error:
            got = f"none for {error}" if isinstance(error, KeyError) else f"'{error}'"
            raise ValueError(checks.fault(str(path), "complete", got, "write it with weft survey")) from error

    @classmethod
    def _from_summary(cls, summary: dict[str, Any], path: Path, model: nn.Module) -> "Survey":
        moments: dict[str, dict[str, dict[str, Tensor]]] = {}
        if summary["moments"]:
            beside = path.with_suffix(".safetensors")
            if not beside.is_file():
                remedy = "survey again, or move both files together"
                raise FileNotFoundError(checks.fault("moments", f"in {beside}", "no such file", remedy))
            try:
                stored = load_file(beside)
            except SafetensorError as error:
                expected = "a whole safetensors file"
                raise ValueError(checks.fault(str(beside), expected, f"'{error}'", "survey again")) from error
            for key, tensor in stored.items():
                name, role, kind = key.rsplit("|", 2)
                moments.setdefault(name, {}).setdefault(role, {})[kind] = tensor
        found, left_dense = find_layers(model)
        for name, entry in summary["layers"].items():
            expected = f"a layer of shape {tuple(entry['shape'])}"
            remedy = "survey this model itself"
            if name not in found:
                raise ValueError(checks.fault(f"layer {name}", expected, "none in the model", remedy))
            if list(found[name].shape) != entry["shape"]:
                raise ValueError(checks.fault(f"layer {name}", expected, found[name].shape, remedy))
        layers = {}
        for name, layer in found.items():
            entry = summary["layers"].get(name)
            if entry is None and name in summary["left_dense"]:  # no data reached it
                continue
            if entry is None:
                raise ValueError(
                    checks.fault(f"layer {name}", "in the survey", "missing", "survey this model itself")
                )
            own = moments.get(name, {})
            geometry = layer.geometry
            if geometry is not None and entry["geometry"]["input_size"] is not None:
                geometry = replace(geometry, input_size=tuple(entry["geometry"]["input_size"]))
            layers[name] = replace(
                layer,
                geometry=geometry,
                applications=entry["applications"],
                input_gram=_gram_from(own.get("input_gram")),
                output_gram=_gram_from(own.get("output_gram")),
                mean_input=own.get("mean_input", {}).get("vector"),
                mean_output=own.get("mean_output", {}).get("vector"),
            )
        return cls(
            layers, {**left_dense, **summary["left_dense"]}, Cost(**summary["total"]), summary["samples"]
        )


def in_columns(rows: Sequence[Sequence[str]], right: int = 2) -> list[str]:
    """Rows as lines of text, every column as wide as its longest cell.

    Args:
        rows: cells; a row may end early.
        right: from which column on cells stand to the right.

    Returns:
        The lines.

    Examples:
        >>> in_columns([("head", "10x64", "640"), ("a", "64x512", "32,768"), ("b",)])
        ['  head  10x64      640', '  a     64x512  32,768', '  b']
    """
    most = max(map(len, rows), default=0)
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(most)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column >= right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _gram_from(stored: dict[str, Tensor] | None) -> Gram | None:
    if stored is None:
        return None
    kind = next(name for name in stored if name != "ridge")
    gram = _GRAM_KINDS[kind](stored[kind])
    gram.ridge = float(stored["ridge"])
    return gram


# ------------------------------------------------------------------------------------------------------------
# Finding layers


def find_layers(model: nn.Module) -> tuple[dict[str, LayerSurvey], dict[str, str]]:
    """The weights of a model that can be replaced, and why others cannot.

    Args:
        model: the network.

    Returns:
        Weights by first layer name, and reasons by layer name.
    """
    left_dense: dict[str, str] = {}
    groups: dict[int, list[str]] = {}
    owners: dict[int, str] = {}  # weights that something else uses too
    fused = {
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }
    for name, module in model.named_modules(remove_duplicate=False):
        reason = refusal(module)
        if reason is None and name in fused:
            reason = (
                "nn.MultiheadAttention reads its weight instead of calling it; "
                "weft.split_attention(model) makes linear layers of it"
            )
        if reason is None:
            groups.setdefault(id(module.weight), []).append(name)
        else:
            if reason:
                left_dense[name] = reason
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), name)
    layers = {}
    for names in groups.values():
        modules = [model.get_submodule(name) for name in names]
        weight = dense_weight(modules[0])
        if weight is None:
            continue
        geometry = geometry_of_layer(modules[0])
        lookup = all(map(looks_up, modules))
        # An embedding's table may be a linear layer's weight, as in language models.
        kinds = {nn.Linear if looks_up(module) else type(module) for module in modules}
        owner = owners.get(id(modules[0].weight))  # a transposed kernel itself is a view
        if owner is not None:
            for name in names:
                left_dense[name] = f"its weight is shared with {owner}"
        elif len(kinds) > 1:
            for name in names:
                left_dense[name] = f"its weight is shared by layers of different kinds: {', '.join(names)}"
        elif len({1 if found is None else found.groups for found in map(geometry_of_layer, modules)}) > 1:
            for name in names:
                left_dense[name] = f"its weight is shared by layers with other groups: {', '.join(names)}"
        elif 0 in weight.shape:
            left_dense[names[0]] = f"its weight is empty: {tuple(weight.shape)}"
        else:
            layers[names[0]] = LayerSurvey(names[0], tuple(names), weight.detach(), geometry, lookup=lookup)
    return layers, left_dense | _kept_by_others(model, tuple(f"{name}." for name in left_dense))


def _kept_by_others(model: nn.Module, told: tuple[str, ...]) -> dict[str, str]:
    """The larger matrices among a model's parameters that belong to no layer of a supported kind."""
    held = {
        f"{name}.{own}".lstrip("."): (parameter, _own_way(module))
        for name, module in model.named_modules()
        if refusal(module) == "" and not f"{name}.".startswith(told)
        for own, parameter in module.named_parameters(recurse=False)
    }
    whole = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    return {
        name: reason
        for name, (parameter, reason) in held.items()
        if not is_lazy(parameter) and parameter.ndim > 1 and parameter.numel() >= WORTH_TELLING * whole
    }


def _own_way(module: nn.Module) -> str:
    """Why the matrices of a module that is no layer stay dense, and what could be compressed in its place."""
    kind = type(module).__name__
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{kind} reads it in one fused call; a recurrence written with nn.Linear can be compressed"
    if isinstance(module, nn.EmbeddingBag):
        return f"{kind} reads it in one fused call; nn.Embedding and a sum can be compressed"
    return f"{kind} uses it in a way of its own"


# ------------------------------------------------------------------------------------------------------------
# Second moments


def patches(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """The input vectors that a convolution's matrix is applied to, one per output position.

    Args:
        x: images, shape (batch, channels, *space).
        kernel: the kernel's spatial size.
        geometry: the convolution's.

    Returns:
        Shape (groups, batch · positions, channels / groups · kernel), in the order of `weight.flatten(1)`.
    """
    return _patches(*_plain_input(x, kernel, geometry), kernel, geometry)


def patches_in_pieces(
    x: Tensor, kernel: Sequence[int], geometry: Geometry, numbers: int = PIECE
) -> Iterator[Tensor]:
    """The same input vectors, few at a time.

    Args:
        x: images, shape (batch, channels, *space).
        kernel: the kernel's spatial size.
        geometry: the convolution's.
        numbers: how many numbers a piece may hold; it holds one row of one image's positions at least.

    Yields:
        Pieces like the result of `patches`.
    """
    size = geometry.output_size(kernel, x.shape[2:])
    per_row = x.shape[1] * math.prod(kernel) * math.prod(size[1:])
    images = numbers // max(1, per_row * size[0])
    if images:
        yield from (patches(part, kernel, geometry) for part in x.split(images))
        return
    rows, reach = max(1, numbers // per_row), geometry.dilation[0] * (kernel[0] - 1) + 1
    for image in x.split(1):
        whole, strides = _plain_input(image, kernel, geometry)
        for first in range(0, size[0], rows):
            count = min(rows, size[0] - first)
            part = whole.narrow(2, first * strides[0], (count - 1) * strides[0] + reach)
            yield _patches(part, strides, kernel, geometry)


def _plain_input(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """The input and strides with which the convolution needs no padding and is not transposed."""
    if not geometry.transposed:
        x, padding = geometry.pad(x)
        if any(padding):
            x = F.pad(x, [size for pad in reversed(padding) for size in (pad, pad)])
        return x, geometry.stride
    size = [(extent - 1) * stride + 1 for extent, stride in zip(x.shape[2:], geometry.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *size)
    spread[(..., *(slice(None, None, stride) for stride in geometry.stride))] = x
    longer = geometry.output_padding or (0,) * len(kernel)
    around = [
        (spacing * (width - 1) - before, spacing * (width - 1) - after + more)
        for (before, after), spacing, width, more in zip(
            geometry.padding, geometry.dilation, kernel, longer, strict=True
        )
    ]
    # Pads below zero cut off.
    return F.pad(spread, [pad for pair in reversed(around) for pad in pair]), (1,) * len(kernel)


def _patches(x: Tensor, strides: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> Tensor:
    space = len(kernel)
    for axis, (width, stride, spacing) in enumerate(zip(kernel, strides, geometry.dilation, strict=True)):
        x = x.unfold(2 + axis, spacing * (width - 1) + 1, stride)[..., ::spacing]
    if geometry.transposed:
        x = x.flip(*range(-space, 0))  # the kernel meets the input turned round
    # (batch, channels, *positions, *kernel) -> (groups, batch, *positions, channels / groups, *kernel)
    x = x.unflatten(1, (geometry.groups, -1))
    order = [1, 0, *range(3, 3 + space), 2, *range(3 + space, 3 + 2 * space)]
    return x.permute(order).reshape(geometry.groups, -1, x.shape[2] * math.prod(kernel))


def input_vectors(x: Tensor, shape: Sequence[int], geometry: Geometry | None) -> Iterator[Tensor]:
    """What a layer's matrix is applied to, few vectors at a time.

    Args:
        x: the layer's input: shape (*batch, inputs), or images with or without the batch axis.
        shape: the weight's shape.
        geometry: the convolution's; None for a linear layer.

    Yields:
        Pieces of shape (groups, count, inputs).

    Raises:
        RuntimeError: a convolution's input has another number of axes; as torch itself says it, only later.
    """
    if geometry is None:
        vectors = x.reshape(1, -1, shape[1])
        yield from vectors.split(max(1, PIECE // shape[1]), dim=1)
        return
    if x.ndim not in {len(shape) - 1, len(shape)}:
        raise RuntimeError(f"a convolution over {len(shape) - 2} axes got an input of {x.ndim}")
    images = x if x.ndim == len(shape) else x.unsqueeze(0)
    yield from patches_in_pieces(images, shape[2:], geometry)


class _Moments:
    """Accumulates the moments of one weight over batches, in float64."""

    def __init__(self, layer: LayerSurvey, spill: "_Spill", *, with_outputs: bool) -> None:
        self.layer = layer
        outputs, inputs = matrix_shape(layer.shape)
        groups = 1 if layer.geometry is None else layer.geometry.groups
        self.diagonal = inputs > WIDEST_DENSE_GRAM
        self.input_moment = None
        if with_outputs or not layer.lookup:
            self.input_moment = spill.zeros((groups, inputs) if self.diagonal else (groups, inputs, inputs))
        self.lookups = torch.zeros(outputs, dtype=torch.int64) if layer.lookup else None
        self.output_moment = None
        if with_outputs and not layer.lookup:
            self.wide_output = outputs > WIDEST_DENSE_GRAM
            self.output_moment = spill.zeros((outputs,) if self.wide_output else (outputs, outputs))
        self.input_sum = torch.zeros(groups, inputs, dtype=torch.float64)
        self.output_sum = torch.zeros(outputs, dtype=torch.float64)
        self.vectors = 0
        self.applications = 0  # those of the kernel: fewer than vectors where it is transposed
        self.input_size: tuple[int, ...] | None = None

    @full_precision()
    def add_input(self, x: Tensor, geometry: Geometry | None) -> None:
        """Adds a layer's input; layers that share the weight may have other strides or dilations."""
        shape = self.layer.shape
        if geometry is None:
            self.applications += x.numel() // shape[1]
        else:
            space = len(shape) - 2
            size, images = tuple(x.shape[-space:]), x.shape[0] if x.ndim == len(shape) else 1
            if geometry == self.layer.geometry:
                self.input_size = size
            self.applications += images * replace(geometry, input_size=size).positions(shape[2:])
        for piece in input_vectors(x, shape, geometry):
            self._add_vectors(piece)

    def _add_vectors(self, vectors: Tensor) -> None:
        """Adds vectors of shape (groups, count, inputs)."""
        vectors = vectors.detach()
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        if not bool(torch.isfinite(vectors).all()):
            remedy = "repair the calibration data, or the layers before"
            raise ValueError(
                checks.fault(f"inputs of layer {self.layer.name}", "finite", "NaN or infinite", remedy)
            )
        self._add_input_moment(vectors)
        self.input_sum += vectors.sum(1).to(device="cpu", dtype=torch.float64)
        self.vectors += vectors.shape[1]

    def _add_input_moment(self, vectors: Tensor) -> None:
        if self.input_moment is None:
            return
        if self.diagonal:
            self.input_moment += vectors.square().sum(1).to(device="cpu", dtype=torch.float64)
        else:
            add_products(self.input_moment, vectors)

    def add_lookups(self, indices: Tensor) -> None:
        """Adds the rows of an embedding that were looked up."""
        if self.lookups is not None:
            self.lookups += torch.bincount(indices.flatten().cpu(), minlength=len(self.lookups))
            self.vectors += indices.numel()
            self.applications += indices.numel()

    @full_precision()
    def add_output(self, y: Tensor) -> None:
        self.output_sum += self._as_rows(y.detach()).to(torch.float64).sum(0).cpu()

    @full_precision()
    def add_output_gradient(self, gradient: Tensor, samples: int) -> None:
        rows = self._as_rows(gradient.detach()).float() * samples  # from the mean loss to each sample's own
        if self.lookups is not None:  # an embedding's output is a row: its entries are the weight's columns
            self._add_input_moment(rows.unsqueeze(0))
        if self.output_moment is None:
            return
        if self.wide_output:
            self.output_moment += rows.square().sum(0).to(device="cpu", dtype=torch.float64)
        else:
            add_products(self.output_moment[None], rows[None])

    def _as_rows(self, y: Tensor) -> Tensor:
        if self.layer.geometry is not None:
            y = y.movedim(-len(self.layer.shape) + 1, -1)
        return y.reshape(-1, y.shape[-1])

    def finish(self, samples: int, shrinkage: float) -> LayerSurvey:
        count = max(1, self.vectors)
        groups = len(self.input_sum)
        input_gram: Gram | None = None
        if self.input_moment is not None:
            self.input_moment /= count
            if self.diagonal:
                input_gram = DiagonalGram(self.input_moment.mean(0), shrinkage)
            elif groups == 1:
                input_gram = DenseGram(self.input_moment[0], shrinkage)
            else:
                input_gram = BlockDiagonalGram(self.input_moment, shrinkage)
        output_gram: Gram | None = None
        if self.lookups is not None:
            frequencies = self.lookups.double() / count
            return replace(
                self.layer,
                applications=self.applications / samples,
                input_gram=input_gram,
                output_gram=DiagonalGram(frequencies, shrinkage),
            )
        if self.output_moment is not None:
            kind = DiagonalGram if self.wide_output else DenseGram
            output_gram = kind(self.output_moment.div_(count), shrinkage)
        geometry = self.layer.geometry
        if geometry is not None:
            geometry = replace(geometry, input_size=self.input_size)
        return replace(
            self.layer,
            geometry=geometry,
            applications=self.applications / samples,
            input_gram=input_gram,
            output_gram=output_gram,
            mean_input=(self.input_sum / count).squeeze(0) if groups == 1 else self.input_sum / count,
            mean_output=self.output_sum / count,
        )


class _Spill:
    """Gives out zeroed float64 tensors; beyond a limit of memory they live in files.

    Without a folder the files have no names, so that nothing is left behind whatever happens to the process.
    In a folder they have: other processes map the same memory.
    """

    def __init__(self, limit: int, folder: str | os.PathLike[str] | None) -> None:
        self.left = limit
        self.folder = folder
        self.files: dict[int, MomentFile] = {}

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape) * 8
        if size <= self.left:
            self.left -= size
            return torch.zeros(shape, dtype=torch.float64)
        handle, name = tempfile.mkstemp(prefix="weft-gram-", dir=self.folder)
        os.close(handle)
        tensor = mapped(Path(name), shape)  # a sparse file reads as zeros
        if self.folder is None:
            Path(name).unlink()  # the mapping outlives it
        else:
            self.files[tensor.data_ptr()] = MomentFile(Path(name))
        return tensor

    def name(self, layer: LayerSurvey) -> LayerSurvey:
        """Tells a finished layer's Grams which files they are in."""
        for gram in (layer.input_gram, layer.output_gram):
            if gram is not None:
                gram.file = self.files.get(gram.moment.data_ptr())
        return layer


# ------------------------------------------------------------------------------------------------------------
# The survey


def survey(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    loss: Callable[[Any, Batch], Tensor] | Literal["squared"] | None = None,
    teacher: nn.Module | None = None,
    shrinkage: float = DEFAULT_SHRINKAGE,
    gram_memory: int = 4 * 2**30,
    spill: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    shown: bool | None = None,
) -> Survey:
    """Finds the weights that can be replaced, and measures what flows through them.

    The model is run in evaluation mode and is not changed; every module gets its own mode back. Batches of
    (inputs, labels) that the model does not take are a TypeError: pass `weft.inputs(batches)`.

    Args:
        model: any module with linear layers or convolutions, or one such layer.
        batches: calibration data without labels: a tensor is called as `model(x)`, a tuple as `model(*x)`, a
            dictionary as `model(**x)`. Without batches there are no Grams, and fits are in the Frobenius
            norm.
        loss: takes the model's output and the batch and gives the mean loss over the batch's samples; its
            gradients make the output Grams (empirical Fisher), by one backward pass per batch. "squared"
            needs no labels: the output Grams are those of the squared distance of a sample's output from what
            it was (Gauss-Newton, by random directions of the output), for classifiers as for any other
            network.
        teacher: gives output Grams without labels: labels are drawn from its softmax (Fisher); usually the
            model. An output of one number is no score of classes and counts as with "squared". A network that
            is sure of its answers has hardly any gradients, and those of a few samples decide: ResNet-20 of
            low ranks at half of its parameters then has 0.575 in place of 0.834, and 0.868 with "squared".
        shrinkage: the ridge of all Grams in units of the mean diagonal.
        gram_memory: bytes of memory for all Grams together; those beyond it live in files that are mapped.
        spill: the folder for these files, removed with their Grams: worker processes then map them as well
            (on Ray it must be one that all nodes see). Where None, temporary files that only this process
            sees.
        generator: the source of the drawn labels; a fixed seed where None.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        The survey; layers that no batch reached are left dense with that reason.

    Raises:
        ValueError: the model has no layer that can be replaced, there are no batches in `batches`, a batch
            does not fit the model, or `loss` and `teacher` are both given or given without batches.
        TypeError: the model is no module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = survey(model, [torch.randn(16, 8)])
        >>> sorted(found.layers), found.total.multiply_adds
        (['0', '2'], 40)
    """
    if isinstance(loss, str) and loss != "squared":
        raise ValueError(checks.fault("loss", '"squared" or a function', repr(loss), "pass a function"))
    if loss is not None and teacher is not None:
        raise ValueError(checks.fault("loss and teacher", "one of the two", "both", "drop one"))
    if batches is None and (loss is not None or teacher is not None):
        raise ValueError(checks.fault("batches", "given with loss or teacher", None, "pass calibration data"))
    if not isinstance(model, nn.Module):
        remedy = "pass the network itself, its weights loaded"
        raise TypeError(checks.fault("model", "an nn.Module", type(model).__name__, remedy))
    layers, left_dense = find_layers(model)
    if not layers and isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        remedy = "pass the Python module that it was made of"
        got = f"a {type(model).__name__}, scripted, traced or exported"
        raise ValueError(checks.fault("model", "one with a layer that can be replaced", got, remedy))
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_dense.items())[:3])
        got = f"none in {type(model).__name__}" + (f" ({reasons})" if reasons else "")
        remedy = "pass a model with nn.Linear, nn.Embedding or nn.Conv layers"
        raise ValueError(checks.fault("model", "one with a layer that can be replaced", got, remedy))
    for layer in layers.values():
        if layer.weight.is_meta:
            remedy = "load its weights first, e.g. model.to_empty(device='cpu') and load_state_dict"
            raise ValueError(checks.fault(f"weight of layer {layer.name}", "loaded", "none (meta)", remedy))
        checks.finite(f"weight of layer {layer.name}", layer.weight)
    if batches is None:
        return Survey(layers, left_dense, network_cost(model))
    return _with_moments(
        model,
        batches,
        layers,
        left_dense,
        loss,
        teacher,
        shrinkage,
        _Spill(gram_memory, spill),
        generator,
        shown,
    )


def survey_shards(
    folder: str | os.PathLike[str],
    *,
    layers: str = WEIGHTS,
    check: bool = True,
    shown: bool | None = None,
) -> Survey:
    """Finds the weights that can be replaced in a checkpoint, without a model and one weight at a time.

    Names and shapes are all that a checkpoint tells: a weight of two axes is taken for a linear layer's or an
    embedding's, one of four for a convolution's without groups that is not transposed. What is none of these
    must be kept dense (`Constraints`), or left out of `layers`.

    Args:
        folder: safetensors shards with their index, or a single file.
        layers: the weights' names; a layer's name is that without its last part.
        check: whether every weight is read, to find out now what is not finite.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        The survey, without Grams and multiply-adds, its weights left in their files.

    Raises:
        ValueError: no weight can be replaced, one is not finite, or a shard is damaged.
    """
    checkpoint = Checkpoint(folder)
    found, left_dense = checkpoint.layers(layers)
    if not found:
        got = f"none like {layers!r} of {len(checkpoint.tensors)} tensors"
        remedy = "give another pattern for their names"
        raise ValueError(checks.fault("shards", "with weights of two or four axes", got, remedy))
    surveyed = {}
    for name, stored in track(found.items(), "reading", total=len(found), shown=shown):
        if check:
            checks.finite(f"weight of layer {name}", stored.read())
        surveyed[name] = LayerSurvey(
            name,
            (name,),
            torch.empty(stored.shape, dtype=stored.dtype, device="meta"),
            Geometry((1, 1), ((0, 0), (0, 0)), (1, 1)) if len(stored.shape) == 4 else None,
            stored=stored,
        )
    tensors = checkpoint.tensors.values()
    total = Cost(
        sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype is not None),
        sum(tensor.nbytes for tensor in tensors),
    )
    return Survey(surveyed, left_dense, total)


def _with_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: dict[str, LayerSurvey],
    left_dense: dict[str, str],
    loss: Callable[[Any, Batch], Tensor] | Literal["squared"] | None,
    teacher: nn.Module | None,
    shrinkage: float,
    spill: _Spill,
    generator: torch.Generator | None,
    shown: bool | None,
) -> Survey:
    backward = loss is not None or teacher is not None
    moments = {name: _Moments(layer, spill, with_outputs=backward) for name, layer in layers.items()}
    caught: list[tuple[_Moments, Tensor]] = []
    handles = []

    def listen(own: _Moments, module: nn.Module) -> None:
        geometry = geometry_of_layer(module)
        if looks_up(module) and not own.layer.lookup:
            return  # a table that a linear layer shares is fitted for that layer

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            if own.layer.lookup:
                own.add_lookups(given)
            else:
                own.add_input(given, geometry)

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not own.layer.lookup:
                own.add_output(output)
            if not backward:
                return None
            # A copy goes on, so that an in-place activation does not change what was caught.
            kept = output if output.requires_grad else output.detach().requires_grad_()
            caught.append((own, kept))
            return kept.clone()

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    samples = 0
    first: Batch | None = None
    applications_in_first: dict[str, float] = {}
    generator = generator or torch.Generator().manual_seed(0)
    try:
        for name, layer in layers.items():
            for module in {id(found): found for found in map(model.get_submodule, layer.names)}.values():
                listen(moments[name], module)
        with evaluating(model), slow_attention_path(), torch.set_grad_enabled(backward):
            for batch in track(batches, "surveying", shown=shown):
                size = batch_size(batch)
                if not size:
                    continue
                batch = to_device(batch, device_of(model))
                output = call_checked(model, batch)
                if backward:
                    if loss == "squared" or (loss is None and logits_of(output).shape[-1] == 1):
                        value = _along_random_direction(output, generator) / size
                    elif loss is not None:
                        value = loss(output, batch)
                    else:
                        value = _drawn_label_loss(
                            output, _teacher_output(teacher, model, output, batch), generator
                        )
                    gradients = torch.autograd.grad(
                        value, [tensor for _, tensor in caught], allow_unused=True
                    )
                    for (own, _), gradient in zip(caught, gradients, strict=True):
                        if gradient is not None:
                            own.add_output_gradient(gradient, size)
                    caught.clear()
                samples += size
                if first is None:
                    first = batch
                    applications_in_first = {name: own.applications / size for name, own in moments.items()}
    finally:
        for handle in handles:
            handle.remove()
    if first is None:
        remedy = "pass at least one batch; a generator can be used only once"
        raise ValueError(checks.fault("batches", "not empty", "no samples", remedy))
    reached = {}
    for name, own in moments.items():
        if own.vectors:
            reached[name] = spill.name(own.finish(samples, shrinkage))
        else:
            left_dense[name] = "no calibration data reached it"
    if not reached:
        remedy = "pass data that runs through the model's layers"
        raise ValueError(checks.fault("batches", "such that they reach a layer", "none reached", remedy))
    # The network is counted on the first batch; where batches differ in length, its layers are known better.
    total = network_cost(model, first)
    more = sum(
        layer.weight.numel() * (layer.applications - applications_in_first[name])
        for name, layer in reached.items()
        if not layer.lookup
    )
    total = replace(total, multiply_adds=total.multiply_adds + round(more))
    return Survey(reached, left_dense, total, samples)


def _teacher_output(teacher: nn.Module | None, model: nn.Module, output: Any, batch: Batch) -> Any:
    if teacher is None or teacher is model:
        return output
    with evaluating(teacher), torch.no_grad():
        return call(teacher, batch)


def _along_random_direction(output: Any, generator: torch.Generator) -> Tensor:
    """⟨v, y⟩ with E[v vᵀ] = I: the second moment of its gradients Jᵀv is JᵀJ."""
    scores = logits_of(output)
    direction = torch.randn(scores.shape, generator=generator, dtype=torch.float32)
    return (scores.float() * direction.to(scores.device)).sum()


def _drawn_label_loss(output: Any, teacher_output: Any, generator: torch.Generator) -> Tensor:
    """Cross-entropy with labels drawn from the teacher; its gradients' second moment is the Fisher matrix."""
    scores = class_scores(logits_of(output))
    flat = scores.reshape(-1, scores.shape[-1])
    chances = class_scores(logits_of(teacher_output)).detach().reshape(flat.shape).float().softmax(-1).cpu()
    labels = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(flat.device)
    per_sample = flat.shape[0] / max(1, scores.shape[0])
    return F.cross_entropy(flat.float(), labels) * per_sample
