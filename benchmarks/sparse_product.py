"""SparseProduct and PALM4MSA against pyfaust 3.41, truncated SVD and pruning, in one run on one thread.

    python benchmarks/sparse_product.py             # --parts palm for one

pyfaust takes part where it is installed (`pip install pyfaust==3.41`), else its rows are left out. Times that
are compared are measured alternately; the JSON holds median and least.
"""

import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import parts
import torch
from parts import Rows
from torch import Tensor

from weft.numerics.palm4msa import SparseFactorisation, hierarchical, palm4msa, refit, splitting
from weft.structures.base import DenseGram, Gram, Structure, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.sparse_product import SparseProduct

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own optional packages
        from pyfaust import fact as pyfaust_algorithms
        from pyfaust import wht as pyfaust_hadamard
        from pyfaust.factparams import ConstraintList, ParamsPalm4MSA, StoppingCriterion
except ImportError:
    pyfaust_algorithms = None

SIZE, SPARSITY, ITERATIONS, REPEATS = 1024, 14, 30, 3
FEATURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_features" / "mobilenet_v2.npz"


def gaussian(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((SIZE, SIZE))).float()


def decaying(seed: int = 0) -> Tensor:
    """Random singular vectors, σ_k = k^-0.75."""
    left, _, right = torch.linalg.svd(gaussian(seed).double())
    return (left * torch.arange(1, SIZE + 1, dtype=torch.float64) ** -0.75 @ right).float()


def timed(
    calls: Mapping[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, dict], dict[str, object]]:
    """Times in seconds of calls that take turns, and what each returned last."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, object] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            results[name] = call()
            times[name].append(time.perf_counter() - start)
    summary = {name: {"seconds": statistics.median(t), "least": min(t)} for name, t in times.items()}
    return summary, results


def pyfaust_palm(matrix: np.ndarray, **options: object) -> tuple[np.ndarray, int]:
    """pyfaust's PALM4MSA with its `splincol` projection in its fastest precision: product and entries."""
    constraint = ("splincol", SPARSITY, SIZE, SIZE)
    parameters = ParamsPalm4MSA(
        ConstraintList(*constraint, *constraint), StoppingCriterion(num_its=ITERATIONS), **options
    )
    product = pyfaust_algorithms.palm4msa(matrix, parameters, backend=2020)
    return product.toarray(), product.nnz_sum()


def entries(fit: SparseFactorisation) -> int:
    return sum(int((factor != 0).sum()) for factor in fit.factors)


def palm() -> Rows:
    """30 iterations of PALM4MSA beside pyfaust's, baselines of equal size, and how much lower it gets."""
    rows: Rows = []
    for name, target in (("gaussian", gaussian()), ("decaying", decaying())):
        calls: dict[str, Callable[[], object]] = {
            "weft palm4msa": partial(
                palm4msa, target, SPARSITY, 2, iterations=ITERATIONS, tolerance=0.0, right_first=False
            )
        }
        if pyfaust_algorithms is not None:
            matrix = target.numpy()
            calls["pyfaust"] = partial(pyfaust_palm, matrix)
            calls["pyfaust packing_RL=False"] = partial(pyfaust_palm, matrix, packing_RL=False)
        times, results = timed(calls, REPEATS)
        published = results["weft palm4msa"]
        better, fits = timed(
            {
                "weft palm4msa, refitted": partial(refit, target, published),
                "weft splitting": partial(splitting, target, SPARSITY, 2),
            },
            1,
        )
        times |= better
        for method, fit in (results | fits).items():
            if isinstance(fit, SparseFactorisation):
                error, count = relative_error(target, fit.to_dense()), entries(fit)
            else:
                error, count = relative_error(target, torch.from_numpy(fit[0])), fit[1]
            rows.append({"matrix": name, "method": method, "error": error, "entries": count, **times[method]})
        count = entries(published)
        size = target.flatten().abs()
        pruned = target * (target.abs() >= size.kthvalue(size.numel() - count + 1).values)
        singular = torch.linalg.svdvals(target.double()).square()
        rank = count // (2 * SIZE)
        baselines = {
            "magnitude pruning": relative_error(target, pruned),
            "truncated SVD": math.sqrt(float(singular[rank:].sum() / singular.sum())),
        }
        rows += [
            {"matrix": name, "method": method, "error": error, "entries": count}
            for method, error in baselines.items()
        ]
    base = {
        row["matrix"]: min(
            (
                r["least"]
                for r in rows
                if r["matrix"] == row["matrix"] and str(r["method"]).startswith("pyfaust")
            ),
            default=None,
        )
        for row in rows
    }
    for row in rows:
        reference = base[row["matrix"]]
        if reference is not None and "least" in row:
            row["over_fastest_pyfaust"] = row["least"] / reference
        shown = f"{row['seconds']:7.2f} s" if "seconds" in row else " " * 9
        ratio = f"{row['over_fastest_pyfaust']:5.2f} x pyfaust" if "over_fastest_pyfaust" in row else ""
        print(
            f"palm {row['matrix']:9} {row['method']:26} {shown} error {row['error']:.4f} {ratio}", flush=True
        )
    return rows


def hadamard() -> Rows:
    """The hierarchical variant on Hadamard matrices, log2 n factors with 2 entries per row."""
    rows: Rows = []
    for size in (32, 64, 256):
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
        calls: dict[str, Callable[[], object]] = {
            "weft": partial(hierarchical, matrix, 2, round(math.log2(size)))
        }
        if pyfaust_algorithms is not None and size <= 64:
            array = pyfaust_hadamard(size, normed=False).toarray()
            calls["pyfaust"] = partial(pyfaust_algorithms.hierarchical, array, "hadamard", backend=2020)
        times, results = timed(calls, REPEATS if size <= 64 else 1)
        for method, fit in results.items():
            dense = fit.to_dense() if method == "weft" else torch.from_numpy(fit.toarray())
            row = {"size": size, "method": method, "error": relative_error(matrix, dense), **times[method]}
            rows.append(row)
            print(
                f"hadamard {size:4} {method:8} {row['seconds']:7.2f} s  error {row['error']:.1e}", flush=True
            )
    return rows


def forward() -> Rows:
    """One application and one training step of the PyTorch route, against the dense layer."""
    rows: Rows = []
    dense = torch.nn.Linear(1280, 1000, bias=False)
    member = SparseProduct(2, 112, "random").initialise((1000, 1280))
    share = member.values.numel() / dense.weight.numel()

    def step(apply: Callable[[Tensor], Tensor], x: Tensor) -> None:
        apply(x).sum().backward()

    for batch in (1, 16, 128, 512):
        x = torch.randn(batch, 1280, requires_grad=True)
        for kind, wrap in (("forward", lambda apply, x: apply(x.detach())), ("forward and backward", step)):
            calls = {"dense": partial(wrap, dense, x), "weft": partial(wrap, member, x)}
            with torch.set_grad_enabled(kind != "forward"):
                timed(calls, 2)
                times, _ = timed(calls, 10 * REPEATS)
            row = {
                "batch": batch,
                "kind": kind,
                "parameter_share": share,
                "dense_seconds": times["dense"]["seconds"],
                "seconds": times["weft"]["seconds"],
                "over_dense": times["weft"]["seconds"] / times["dense"]["seconds"],
            }
            rows.append(row)
            print(f"{kind:21} batch {batch:4}: {row['over_dense']:5.2f} x dense", flush=True)
    return rows


def classifier() -> Rows:
    """Fits of MobileNetV2's classifier beside low rank's: relative and weighted error, top-1."""
    if not FEATURES.exists():
        print(f"classifier: {FEATURES} is not on this machine; left out")
        return []
    with np.load(FEATURES, allow_pickle=False) as arrays:
        weight, bias = torch.from_numpy(arrays["W"]).float(), torch.from_numpy(arrays["b"]).float()
        sample = torch.from_numpy(arrays["f_sample"]).double()
        held_out = torch.from_numpy(arrays["f_val"]).float()
        labels = torch.from_numpy(arrays["y_val"]).long()
    gram = DenseGram(sample.T @ sample / len(sample))
    rows: Rows = []
    for share in (0.1, 0.2, 0.4):
        numbers = int(share * weight.numel())
        sparsity = numbers * 98 // (100 * sum(weight.shape))  # the union holds a little more than K per line
        structures: list[Structure] = [
            SparseProduct(2, sparsity),
            SparseProduct(2, sparsity, "splitting"),
            LowRank(numbers // sum(weight.shape)),
        ]
        for structure in structures:
            plain_error = math.nan
            for kind, grams in (("plain", {}), ("weighted", {"input_gram": gram})):
                row = _classifier_row(structure, weight, gram, grams)
                dense = row.pop("dense")
                plain_error = row["weighted_error"] if kind == "plain" else plain_error
                row |= {
                    "fit": kind,
                    "weighted_error_over_plain": row["weighted_error"] / plain_error,
                    "top1": float(((held_out @ dense.T + bias).argmax(1) == labels).float().mean()),
                }
                rows.append(row)
                print(
                    f"{row['structure']:62} {kind:8} share {row['share']:.3f} "
                    f"relative {row['relative_error']:.3f} weighted {row['weighted_error']:.3f} "
                    f"({row['weighted_error_over_plain']:.3f}) top-1 {row['top1']:.3f} "
                    f"in {row['seconds']:.0f} s",
                    flush=True,
                )
    return rows


def _classifier_row(structure: Structure, weight: Tensor, gram: Gram, grams: dict[str, Gram]) -> dict:
    start = time.perf_counter()
    member = structure.fit(weight, **grams)
    elapsed = time.perf_counter() - start
    dense = member.to_dense().detach()
    return {
        "structure": str(structure),
        "share": member.cost().parameters / weight.numel(),
        "seconds": elapsed,
        "relative_error": relative_error(weight, dense),
        "weighted_error": relative_error(weight, dense, input_gram=gram),
        "dense": dense,
    }


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # pyfaust's threads are its library's, which reads the environment when it is loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    if pyfaust_algorithms is None:
        print("pyfaust is not installed, its rows are left out; pip install pyfaust==3.41")
    measured = {"palm": palm, "hadamard": hadamard, "forward": forward, "classifier": classifier}
    parts.run(__file__, __doc__, measured, packages=("pyfaust", "numpy"))
