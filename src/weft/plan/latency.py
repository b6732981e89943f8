"""Times of layers on this machine, for budgets that limit latency."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.layers.linear import StructuredLinear
from weft.measure import (
    Batch,
    call,
    device_of,
    environment,
    evaluating,
    repeat_to,
    threads,
    time_alternating,
    to_device,
)
from weft.progress import track
from weft.storage import read_json, write_text
from weft.structures.base import Structure, StructuredMatrix
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey

# Seconds spent on the whole network and on one layer; the median of at least 15 calls in any case.
_NETWORK_SECONDS, _LAYER_SECONDS = 1.0, 0.03
# What a time depends on beside the layer itself.
_MACHINE = ("processor", "cores", "system", "torch", "kernels")


class LatencyTable:
    """Times of single layers and of the dense network, measured when they are first asked for.

    A layer is timed by itself with random inputs of the size that the survey saw, a structure by a random
    member: values do not matter to its time.

    Args:
        model: the dense network.
        survey: its survey, with batches.
        sample: inputs of the network, repeated or cut to the batch size.
        batch: samples per call.
        thread_count: torch's thread count; the current one where None.
        cache: a folder that keeps times between runs, apart for every machine and version; None for none.

    Raises:
        ValueError: the survey is one without data, or the model is not on the CPU.

    Attributes:
        dense_seconds: the dense network's time per call.
        rest_seconds: that of everything but the surveyed layers.
    """

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        sample: Batch,
        *,
        batch: int = 1,
        thread_count: int | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if not survey.samples:
            remedy = "survey with batches, so that the layers' input sizes are known"
            raise ValueError(checks.fault("survey", "one with data", "one without", remedy))
        device = device_of(model)
        if device.type != "cpu":
            raise ValueError(checks.fault("model", "on the CPU", device, "move it there to plan"))
        self.batch = checks.integer_between("batch", batch, 1, None)
        self.thread_count = torch.get_num_threads() if thread_count is None else thread_count
        checks.integer_between("thread_count", self.thread_count, 1, None)
        self._known: dict[str, float] = {}
        self._file = None if cache is None else _file(Path(cache))
        if self._file is not None and self._file.is_file():
            try:
                self._known = read_json(self._file, "weft_latencies", "")["seconds"]
            except (ValueError, KeyError):
                self._known = {}  # a damaged cache is measured again
        given = to_device(repeat_to(sample, batch), device)
        with evaluating(model), torch.inference_mode():
            self.dense_seconds = self._time(lambda: call(model, given), _NETWORK_SECONDS)
        layers = sum(self.seconds(layer, Dense()) for layer in survey.layers.values())
        # Timed one by one layers may take longer than in the network, where their inputs are still cached.
        self.dense_seconds = max(self.dense_seconds, layers)
        self.rest_seconds = self.dense_seconds - layers

    def prepare(self, pairs: Iterable[tuple[LayerSurvey, Structure]], *, shown: bool | None = None) -> None:
        """Measures what is not yet known, under a progress bar, and keeps it.

        Args:
            pairs: layers, each with a structure.
            shown: whether to draw; where None, on a terminal (lines elsewhere).
        """
        missing = [
            (layer, structure) for layer, structure in pairs if self._key(layer, structure) not in self._known
        ]
        for layer, structure in track(missing, "timing layers", shown=shown):
            self.seconds(layer, structure)
        self.save()

    def seconds(self, layer: LayerSurvey, structure: Structure) -> float:
        """The time that a layer takes per call of the network.

        Args:
            layer: the layer's survey.
            structure: what stands in for its weight.

        Returns:
            Seconds, the median.
        """
        key = self._key(layer, structure)
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = self._time(
                    layer_call(layer, structure, self._calls(layer))[0], _LAYER_SECONDS
                )
        return self._known[key]

    def save(self) -> None:
        """Keeps the times in the cache's folder, if there is one."""
        if self._file is not None:
            record = {"weft_latencies": 1, "environment": environment(), "seconds": self._known}
            write_text(self._file, json.dumps(record, indent=0))

    def _time(self, run: Callable[[], object], seconds: float) -> float:
        with threads(self.thread_count):
            return time_alternating({"": run}, seconds=seconds)[""].median

    def _key(self, layer: LayerSurvey, structure: Structure) -> str:
        geometry = None if layer.geometry is None else asdict(layer.geometry)
        parts = [structure.to_json(), layer.shape, geometry, layer.lookup, self._calls(layer)]
        kind = () if layer.weight.dtype == torch.float32 else (str(layer.weight.dtype),)
        return json.dumps([*parts, self.batch, self.thread_count, *kind])

    def _calls(self, layer: LayerSurvey) -> int:
        return max(1, round(self.batch * layer.calls))


def layer_call(
    layer: LayerSurvey, structure: Structure, calls: int
) -> tuple[Callable[[], Tensor], StructuredMatrix | None]:
    """A layer to run by itself, with random inputs of the size that the survey saw, in the weight's dtype.

    Args:
        layer: the layer's survey.
        structure: what stands in for its weight, as a random member.
        calls: vectors, lookups or images at a time.

    Returns:
        What runs it, and the member; None for the dense layer.
    """
    generator = torch.Generator().manual_seed(0)
    shape, geometry, dtype = layer.shape, layer.geometry, layer.weight.dtype
    member = None
    if not isinstance(structure, Dense):
        member = structure.initialise(shape, generator=generator).to(dtype).eval()

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    weight = random(*(shape if member is None else ()))
    if layer.lookup:
        indices = torch.randint(shape[0], (calls,), generator=generator)
        if member is None:
            return lambda: F.embedding(indices, weight), None
        return lambda: member.rows(indices), member
    if geometry is None:
        x, bias = random(calls, shape[1]), random(shape[0])
        if member is None:
            return lambda: F.linear(x, weight, bias), None
        # As a network calls it, but for what a call of any module costs, nn.Linear's too.
        forward = StructuredLinear(member, bias).eval().forward
        return lambda: forward(x), member
    size = geometry.input_size or (1,) * len(geometry.stride)
    images = random(calls, shape[1] * geometry.groups, *size)
    plain = replace(geometry, input_size=None)
    if member is None:
        return lambda: plain.convolve(images, weight), None
    return lambda: member.convolve(images, plain), member


def _file(folder: Path) -> Path:
    """One file per machine and version."""
    here = environment()
    machine = json.dumps({name: here[name] for name in _MACHINE})
    (folder / "latencies").mkdir(parents=True, exist_ok=True)
    return folder / "latencies" / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
