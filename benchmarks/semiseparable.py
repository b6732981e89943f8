"""SequentiallySemiseparable against structurednets and the dense product, in one run on one thread.

    python benchmarks/semiseparable.py             # --parts fit for one

structurednets takes part where it can be imported (it is on no package index), else its columns are left out.
Times that are compared are measured alternately, and medians are given; the JSON holds the deciles, too.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import parts
import torch
from parts import Rows
from torch import Tensor

from weft.measure import time_alternating
from weft.structures.base import DenseGram, Structure, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.semiseparable import SequentiallySemiseparable

try:
    from structurednets.approximators.sss_approximator import SSSApproximator
    from structurednets.approximators.sss_approximator_wrapper import SSSApproximatorWrapper
    from structurednets.layers.sss_layer import SSSLayer
except ImportError:
    SSSApproximator = SSSApproximatorWrapper = SSSLayer = None

SHAPE, SHARE = (1000, 512), 0.2
FEATURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_features" / "mobilenet_v2.npz"


def decaying(seed: int = 0) -> Tensor:
    """Random singular vectors, σ_k = k^-0.75."""
    generator = torch.Generator().manual_seed(seed)
    width = min(SHAPE)
    left, right = (
        torch.linalg.qr(torch.randn(size, width, dtype=torch.float64, generator=generator))[0]
        for size in SHAPE
    )
    return (left * torch.arange(1, width + 1, dtype=torch.float64) ** -0.75) @ right.T


def kernel() -> Tensor:
    """1 / (0.01 + |x − y|) on two grids of the unit interval."""
    x, y = (torch.linspace(0, 1, size, dtype=torch.float64) for size in SHAPE)
    return 1 / (0.01 + (x[:, None] - y).abs())


def fits(stages: int = 10) -> Rows:
    """Time and error of a fit at 20 % of the parameters."""
    rows = []
    largest = SequentiallySemiseparable.largest(SHAPE, stages, int(SHARE * SHAPE[0] * SHAPE[1]))
    same = SequentiallySemiseparable(stages, 15)  # the dimension that structurednets' own count allows
    for name, weight in (("decaying", decaying()), ("kernel", kernel())):
        calls: dict[str, Callable[[], object]] = {}
        errors = {}
        for method, structure, given in (
            ("weft float64", largest, weight),
            ("weft float32", largest, weight.float()),
            ("weft float64 d=15", same, weight),
        ):
            calls[method] = partial(structure.fit, given)
            errors[method] = relative_error(weight, structure.fit(given).to_dense())
        if SSSApproximator is not None:
            matrix = weight.numpy()
            calls["structurednets"] = partial(SSSApproximator(stages).approximate, matrix, SHARE)
            approximation = SSSApproximator(stages).approximate(matrix, SHARE)["approx_mat_dense"]
            errors["structurednets"] = float(np.linalg.norm(matrix - approximation) / np.linalg.norm(matrix))
        times = time_alternating(calls, least=7)
        for method, error in errors.items():
            rows.append({
                "matrix": name,
                "stages": stages,
                "method": method,
                "error": error,
                **asdict(times[method]),
            })
            label = f"fit {name:9} p={stages} {method:18}"
            print(f"{label} {times[method].median:8.3f} s  error {error:.4g}", flush=True)
    return rows


def searches() -> Rows:
    """Time, result and error of the search for stages and state dimension."""
    rows = []
    weight = decaying()
    start = time.perf_counter()
    found = SequentiallySemiseparable.search(weight, SHARE)
    elapsed = time.perf_counter() - start
    rows.append({
        "method": "weft",
        "seconds": elapsed,
        "structure": str(found),
        "error": relative_error(weight, found.fit(weight).to_dense()),
    })
    if SSSApproximatorWrapper is not None:  # a minute
        matrix = weight.numpy()
        start = time.perf_counter()
        result = SSSApproximatorWrapper().approximate(matrix, SHARE)
        elapsed = time.perf_counter() - start
        error = float(np.linalg.norm(matrix - result["approx_mat_dense"]) / np.linalg.norm(matrix))
        structure = f"stages={result['nb_states']}, state_dimension={result['state_space_dim']}"
        rows.append({"method": "structurednets", "seconds": elapsed, "structure": structure, "error": error})
    for row in rows:
        print(
            f"search {row['method']:14} {row['seconds']:.2f} s  {row['structure']}  error {row['error']:.4f}"
        )
    return rows


def forwards() -> Rows:
    """Time of one application, against the dense layer."""
    rows = []
    weight = decaying().float()
    dense = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    for stages in (10, 51):
        structure = SequentiallySemiseparable.largest(SHAPE, stages, int(SHARE * weight.numel()))
        member = structure.fit(weight)
        layer = None
        if SSSLayer is not None:
            matrix = weight.double().numpy()
            layer = SSSLayer(
                SHAPE[1], SHAPE[0], SHARE, use_bias=False, initial_weight_matrix=matrix, nb_states=stages
            )
        for batch in (1, 128):
            x = torch.randn(batch, SHAPE[1])
            calls: dict[str, Callable[[], object]] = {
                "dense": partial(dense, x),
                "weft": partial(member, x),
            }
            if layer is not None:
                calls["structurednets"] = partial(layer, x)
            with torch.no_grad():
                times = time_alternating(calls)
            for method in calls:
                rows.append({"stages": stages, "batch": batch, "method": method, **asdict(times[method])})
                median, base = times[method].median, times["dense"].median
                label = f"forward p={stages:3} batch {batch:3} {method:14}"
                print(f"{label} {1e3 * median:8.3f} ms {median / base:7.2f} × dense", flush=True)
    return rows


def classifier() -> Rows:
    """Fits of MobileNetV2's classifier beside low rank's: relative and weighted error, top-1."""
    if not FEATURES.exists():
        print(f"classifier: {FEATURES} is not on this machine; left out")
        return []
    with np.load(FEATURES, allow_pickle=False) as arrays:
        weight, bias = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["b"])
        sample = torch.from_numpy(arrays["f_sample"]).double()
        held_out, labels = torch.from_numpy(arrays["f_val"]), torch.from_numpy(arrays["y_val"])
    gram = DenseGram(sample.T @ sample / len(sample))
    rows = []
    for share in (0.1, 0.2, 0.4):
        rank = int(share * weight.numel()) // sum(weight.shape)
        found = SequentiallySemiseparable.search(weight, share, input_gram=gram)
        structures: list[Structure] = [found, LowRank(rank)]
        for structure in structures:
            weighted_errors = {}
            for kind, grams in (("plain", {}), ("weighted", {"input_gram": gram})):
                start = time.perf_counter()
                dense = structure.fit(weight, **grams).to_dense().detach()
                elapsed = time.perf_counter() - start
                weighted_errors[kind] = relative_error(weight, dense, input_gram=gram)
                row = {
                    "structure": str(structure),
                    "share": structure.parameter_count(tuple(weight.shape)) / weight.numel(),
                    "fit": kind,
                    "seconds": elapsed,
                    "relative_error": relative_error(weight, dense),
                    "weighted_error": weighted_errors[kind],
                    "weighted_error_over_plain": weighted_errors[kind] / weighted_errors["plain"],
                    "top1": float(((held_out @ dense.T + bias).argmax(1) == labels).float().mean()),
                }
                rows.append(row)
                print(
                    f"{row['structure']:56} {kind:8} share {row['share']:.3f} "
                    f"relative {row['relative_error']:.3f} weighted {row['weighted_error']:.3f} "
                    f"({row['weighted_error_over_plain']:.3f}) top-1 {row['top1']:.3f} in {elapsed:.1f} s",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = {"fit": fits, "search": searches, "forward": forwards, "classifier": classifier}
    parts.run(__file__, __doc__, measured, packages=("numpy", "structurednets"))
