"""Hierarchical against LowRank and the dense product on a real classifier, in one run on one thread.

    python benchmarks/hierarchical.py             # --parts forward for one

Fits are plain and with the input Gram of the calibration images; accuracy is top-1 on images apart from
these. Times that are compared are measured alternately, and medians are given.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import numpy as np
import parts
import torch
import torch.nn.functional as F
from parts import Rows

from weft.measure import time_alternating
from weft.structures.base import DenseGram, Structure, relative_error
from weft.structures.hierarchical import Hierarchical
from weft.structures.low_rank import LowRank

FEATURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_features" / "mobilenet_v2.npz"
VARIANTS = (
    Hierarchical(rank=1, leaf_size=62),
    Hierarchical(rank=1, leaf_size=125, admissibility="uniform"),
    Hierarchical(rank=1, leaf_size=125, admissibility="uniform", clustering="principal"),
    Hierarchical(rank=1, leaf_size=62, admissibility="uniform", clustering="principal"),
)


def within(family: Structure, shape: tuple[int, int], share: float) -> Structure | None:
    """The member of the largest rank that stores at most this share of the dense parameters."""
    found = None
    for rank in range(1, min(shape) + 1):
        structure = dataclasses.replace(family, rank=rank)
        if structure.parameter_count(shape) > share * shape[0] * shape[1]:
            break
        found = structure
    return found


def classifier() -> Rows:
    """Error, weighted error and accuracy of plain and weighted fits at several shares of the parameters."""
    if not FEATURES.exists():
        print(f"classifier: {FEATURES} is not on this machine; left out")
        return []
    data = np.load(FEATURES)
    weight, features = torch.from_numpy(data["W"]), torch.from_numpy(data["f_sample"]).double()
    gram = DenseGram(features.T @ features / len(features))

    def accuracy(matrix: torch.Tensor) -> float:
        logits = data["f_val"] @ matrix.detach().numpy().T + data["b"]
        return float((logits.argmax(1) == data["y_val"]).mean())

    rows: Rows = [{"structure": "dense", "accuracy": accuracy(weight)}]
    print(f"dense: top-1 {rows[0]['accuracy']:.4f}")
    for share in (0.1, 0.2, 0.4):
        for family in (LowRank(1), *VARIANTS):
            structure = within(family, tuple(weight.shape), share)
            if structure is None:
                continue
            row: dict[str, object] = {
                "share": share,
                "structure": str(structure),
                "data": structure.to_json(),
            }
            for kind, grams in (("plain", {}), ("weighted", {"input_gram": gram})):
                start = time.perf_counter()
                member = structure.fit(weight, **grams)
                row[kind] = {
                    "seconds": time.perf_counter() - start,
                    "parameters": member.cost().parameters,
                    "bytes": member.cost().bytes,
                    "error": relative_error(weight, member.to_dense()),
                    "weighted_error": relative_error(weight, member.to_dense(), input_gram=gram),
                    "accuracy": accuracy(member.to_dense()),
                }
            row["ratio"] = row["weighted"]["weighted_error"] / row["plain"]["weighted_error"]
            rows.append(row)
            print(
                f"{share:.0%} {structure}: weighted error {row['plain']['weighted_error']:.4f} -> "
                f"{row['weighted']['weighted_error']:.4f} ({row['ratio']:.3f}), "
                f"top-1 {row['plain']['accuracy']:.4f} -> {row['weighted']['accuracy']:.4f}, "
                f"fit {row['weighted']['seconds']:.1f} s",
                flush=True,
            )
    return rows


def forwards() -> Rows:
    """Time of one product against the dense one."""
    rows = []
    for shape, structure in (
        ((1000, 512), Hierarchical(rank=30)),
        ((1000, 1280), Hierarchical(rank=19, leaf_size=62)),
        ((1000, 1280), Hierarchical(rank=14, leaf_size=125, admissibility="uniform")),
    ):
        member = structure.initialise(shape, generator=torch.Generator().manual_seed(0)).eval()
        dense = member.to_dense().detach().contiguous()
        for batch in (1, 16, 128):
            x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                times = time_alternating({
                    "dense": partial(F.linear, x, dense),
                    "structured": partial(member, x),
                })
            share = member.cost().parameters / dense.numel()
            ratio = times["structured"].median / times["dense"].median
            rows.append({
                "shape": shape,
                "structure": str(structure),
                "share": share,
                "batch": batch,
                "dense": times["dense"].median,
                "structured": times["structured"].median,
                "ratio": ratio,
            })
            print(f"{shape} {structure} share {share:.3f}, batch {batch}: {ratio:.2f} of dense", flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts.run(__file__, __doc__, {"forward": forwards, "classifier": classifier})
