"""How long structured convolutions take: families that know only matrices by either route, and ResNet-20.

    python benchmarks/convolution_latency.py             # --parts routes for one

"routes" times, for one layer, unfolding against the dense kernel formed once: where the one overtakes the
other is `weft.structures.base.UNFOLDED_SHARE`. "resnet20" times the whole network, every 3×3 convolution but
the first being a random member of one family with at most half of the multiply-adds (of the parameters, for
families that run by the dense kernel), against the dense network, with the peak of its activations. Random
members take the same time as fitted ones. What is compared is called in turns; times are medians. Single
layers by chains are those of `convolutions.py`.
"""

import copy
import math
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import parts
import torch
from parts import Rows
from torch import nn

from weft.layers.replace import geometry_of_layer, replace_layer
from weft.measure import (
    footprint,
    latencies,
    network_cost,
    peak_activations,
    threads,
    time_alternating,
)
from weft.structures import families
from weft.structures.base import Geometry, Structure, ladder, matrix_shape, runs_dense
from weft.structures.sparse_product import SparseProduct

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
from models import resnet20  # noqa: E402  (beside the benchmarks, no package)

LAYERS = ((64, 3, 32), (256, 3, 14), (512, 3, 7), (256, 1, 14))


def routes() -> Rows:
    """Unfolding over the dense kernel, by the share of multiply-adds."""
    rows: Rows = []
    for channels, width, size in LAYERS:
        shape, pad = (channels, channels, width, width), width // 2
        geometry = Geometry((1, 1), ((pad, pad),) * 2, (1, 1), input_size=(size, size))
        dense = torch.randn(shape)
        for name in ("LowRank", "Hierarchical", "SequentiallySemiseparable", "SparseProduct"):
            for share in (0.02, 0.05, 0.1, 0.2):
                structure = largest(families()[name], shape, share, geometry=None)
                if structure is None:
                    continue
                member = structure.initialise(shape).eval()
                for batch in (1, 16):
                    x = torch.randn(batch, channels, size, size)
                    with threads(1), torch.inference_mode():
                        times = time_alternating(
                            {
                                "dense": partial(geometry.convolve, x, dense),
                                "unfold": partial(member._unfold, x, geometry, None),
                            },
                            seconds=0.4,
                            least=5,
                        )
                    rows.append({
                        "shape": shape,
                        "size": size,
                        "structure": str(structure),
                        "batch": batch,
                        "multiply_adds_over_dense": member.multiply_adds() / math.prod(shape),
                        "dense_seconds": times["dense"].median,
                        "unfolded_over_dense": times["unfold"].median / times["dense"].median,
                        "chosen": "dense"
                        if runs_dense(member.multiply_adds(), shape, geometry)
                        else "unfolding",
                    })
                    print(
                        f"{channels} {width}x{width} at {size} batch {batch:2} {name:26} "
                        f"{rows[-1]['multiply_adds_over_dense']:.3f} of the multiply-adds: "
                        f"{rows[-1]['unfolded_over_dense']:6.2f} x dense",
                        flush=True,
                    )
    return rows


def candidates(family: type[Structure], shape: tuple[int, ...]) -> Iterable[Structure]:
    """A family's ladder; random supports for sparse products, whose sizes are then known beforehand."""
    if family is SparseProduct:
        return [SparseProduct(1, entries, "random") for entries in ladder(1, min(matrix_shape(shape)))]
    return family.candidates(shape)


def largest(
    family: type[Structure], shape: tuple[int, ...], share: float, geometry: Geometry | None
) -> Structure | None:
    """The largest candidate within a share of the multiply-adds, or of the parameters where none is."""
    dense = math.prod(shape) * (1 if geometry is None else geometry.positions(shape[2:]))
    best: dict[str, Structure] = {}
    for candidate in candidates(family, shape):
        products, count = candidate.multiply_adds(shape, geometry), candidate.parameter_count(shape)
        if products is None or count is None:
            continue
        if products <= share * dense:
            best["multiply_adds"] = candidate
        if count <= share * math.prod(shape):
            best["parameters"] = candidate
    return best.get("multiply_adds", best.get("parameters"))


def whole() -> Rows:
    """ResNet-20 at half of the multiply-adds, by one family after the other."""
    rows: Rows = []
    dense = resnet20().eval()
    sample = torch.randn(64, 3, 32, 32)
    for name in (
        "LowRank",
        "Separable",
        "Tucker",
        "CanonicalPolyadic",
        "TensorTrain",
        "SparseProduct",
        "Hierarchical",
    ):
        if name not in families():
            continue
        small = copy.deepcopy(dense)
        for layer, module in dense.named_modules():
            if not isinstance(module, nn.Conv2d) or layer == "conv1":
                continue
            shape = tuple(module.weight.shape)
            structure = largest(families()[name], shape, 0.5, geometry_of_layer(module))
            if structure is not None:
                small = replace_layer(small, [layer], structure.initialise(shape))
        small.eval()
        before, after = network_cost(dense, sample[:1]), network_cost(small, sample[:1])
        activations, dense_activations = peak_activations(small, sample), peak_activations(dense, sample)
        held = footprint(small)
        for timed in latencies(dense, small, sample, batches=(1, 64), thread_counts=(1, 2), seconds=1.5):
            rows.append({
                "family": name,
                "batch": timed.batch,
                "threads": timed.threads,
                "multiply_adds_over_dense": after.multiply_adds / before.multiply_adds,
                "parameters_over_dense": after.parameters / before.parameters,
                "dense_seconds": timed.dense.median,
                "seconds": timed.compressed.median,
                "over_dense": timed.compressed.median / timed.dense.median,
                "pays": timed.compressed.median < timed.dense.median,
                "activation_bytes_per_image": activations,
                "dense_activation_bytes_per_image": dense_activations,
                "kept_bytes": held.memory - held.stored,
            })
            row = rows[-1]
            print(
                f"{name} batch {timed.batch} threads {timed.threads}: {row['over_dense']:.2f} x dense at "
                f"{row['multiply_adds_over_dense']:.2f} of the multiply-adds, "
                f"{row['parameters_over_dense']:.2f} of the parameters, "
                f"{activations} B per image (dense {dense_activations})",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    parts.run(__file__, __doc__, {"routes": routes, "resnet20": whole})
