"""Peak memory: what weights and activations take at once, for budgets that limit it.

While a layer runs, what the call had allocated before it is still there, and its own output and intermediate
results come on top. So with structures s the peak of a call is

    Σ resident(layer, s)  +  max(outside, max over layers of (before(layer) + transient(layer, s))),

the first sum over weights and all that structured matrices keep beside them, the maximum over activations.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from weft import checks
from weft.measure import Batch, activation_profile, device_of, footprint, repeat_to, to_device, traced_peak
from weft.plan.latency import layer_call
from weft.progress import track
from weft.structures.base import Structure
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey


class MemoryTable:
    """Bytes of single layers and of the dense network for one sample, measured when they are first asked for.

    A layer is run by itself with a random input of the size that the survey saw, a structure as a random
    member: values do not matter to its memory.

    Args:
        model: the dense network, on the CPU.
        survey: its survey, with batches.
        sample: inputs of the network; the first sample is taken.

    Raises:
        ValueError: the survey is one without data, or the model is not on the CPU.

    Attributes:
        dense_bytes: the peak of a call of the dense network, its weights included.
        rest_bytes: what stays in memory of everything but the surveyed layers.
        outside_bytes: the peak of the activations while no surveyed layer runs.
    """

    def __init__(self, model: nn.Module, survey: Survey, sample: Batch) -> None:
        if not survey.samples:
            remedy = "survey with batches, so that the layers' input sizes are known"
            raise ValueError(checks.fault("survey", "one with data", "one without", remedy))
        device = device_of(model)
        if device.type != "cpu":
            raise ValueError(checks.fault("model", "on the CPU", device, "move it there to plan"))
        modules = {
            name: list(dict.fromkeys(model.get_submodule(one) for one in layer.names))
            for name, layer in survey.layers.items()
        }
        given = to_device(repeat_to(sample, 1), device)
        self._before, self.outside_bytes = activation_profile(model, given, modules)
        self._known: dict[tuple[str, Structure], tuple[int, int]] = {}
        dense = sum(layer.weight.nbytes for layer in survey.layers.values())
        resident = footprint(model).memory
        self.rest_bytes = resident - dense
        activations = max([
            self.outside_bytes,
            *(self.live(layer, Dense()) for layer in survey.layers.values()),
        ])
        self.dense_bytes = resident + activations

    def resident(self, layer: LayerSurvey, structure: Structure) -> int:
        """What stays in memory for a layer between calls.

        Args:
            layer: the layer's survey.
            structure: what stands in for its weight.

        Returns:
            Bytes: those stored, and what is unpacked from them.
        """
        return self._measured(layer, structure)[0]

    def live(self, layer: LayerSurvey, structure: Structure) -> int:
        """What activations take at the most while a layer runs.

        Args:
            layer: the layer's survey.
            structure: what stands in for its weight.

        Returns:
            Bytes, of a call with one sample.
        """
        return self._before.get(layer.name, 0) + self._measured(layer, structure)[1]

    def prepare(self, pairs: Iterable[tuple[LayerSurvey, Structure]], *, shown: bool | None = None) -> None:
        """Measures what is not yet known, under a progress bar.

        Args:
            pairs: layers, each with a structure.
            shown: whether to draw; where None, on a terminal (lines elsewhere).
        """
        missing = [pair for pair in pairs if (pair[0].name, pair[1]) not in self._known]
        for layer, structure in track(missing, "measuring memory", shown=shown):
            self._measured(layer, structure)

    def _measured(self, layer: LayerSurvey, structure: Structure) -> tuple[int, int]:
        key = layer.name, structure
        if key not in self._known:
            run, member = layer_call(layer, structure, max(1, round(layer.calls)))
            with torch.inference_mode():
                run()  # what is kept between calls is formed now
                transient = traced_peak(run)
            resident = layer.weight.nbytes
            if member is not None:
                tensors = {tensor.data_ptr(): tensor for tensor in (*member.parameters(), *member.buffers())}
                resident = sum(tensor.nbytes for tensor in tensors.values()) + member.derived_bytes()
            self._known[key] = resident, transient
        return self._known[key]

    def thresholds(
        self, layers: Mapping[str, LayerSurvey], structures: Mapping[str, Sequence[Structure]], most: int = 12
    ) -> list[int]:
        """Bounds on the activations for a plan to choose from: the lower, the more the weights may take.

        Args:
            layers: the surveys.
            structures: what every layer may have.
            most: how many bounds at most.

        Returns:
            Increasing bytes; at the least of them every layer still has a structure.
        """
        live = {
            name: [self.live(layers[name], structure) for structure in own]
            for name, own in structures.items()
        }
        least = max([self.outside_bytes, *(min(own) for own in live.values())])
        above = sorted({value for own in live.values() for value in own if value > least})
        if len(above) > most - 1:
            above = [above[round(index * (len(above) - 1) / (most - 2))] for index in range(most - 1)]
        return [least, *above]
