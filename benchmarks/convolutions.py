"""Chains of convolutions against tensorly-torch and against the dense layer, in one run.

    python benchmarks/convolutions.py             # --parts peer for one

Part `peer`: CP and Tucker of a 64→128 3×3 kernel at a quarter of its numbers, decomposed and run by weft
and by tensorly-torch 0.5 (takes part where it is installed: `pip install tensorly tensorly-torch`). Part
`layers`: three layers of a ResNet at half the dense multiply-adds by every family, batch 1 and 64, one and
two threads. Times that are compared are measured alternately; the JSON holds medians. A ratio above 1 says
that factorising does not pay there.
"""

import warnings
from collections.abc import Callable
from functools import partial

import parts
import torch
from parts import Rows
from torch import Tensor, nn

from weft.layers.convolution import StructuredConvolution, geometry_of
from weft.measure import threads, time_alternating
from weft.structures.base import Geometry, Structure, relative_error
from weft.structures.canonical_polyadic import CanonicalPolyadic
from weft.structures.low_rank import LowRank
from weft.structures.separable import Separable
from weft.structures.tucker import Tucker

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch
except ImportError:
    tltorch = None

LAYERS = ((64, 32), (256, 14), (512, 7))  # channels, image size
SHARE = 0.5


def kernel(outputs: int, channels: int, seed: int = 0) -> Tensor:
    """A kernel with decaying singular values in both channel modes, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(outputs, channels, 3, 3, generator=generator)
    for axis, size in enumerate((outputs, channels)):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        scaled = basis * torch.arange(1, size + 1) ** -0.5
        core = torch.tensordot(scaled, core.movedim(axis, 0), dims=1).movedim(0, axis)
    return core / core.norm() * (outputs * 2) ** 0.5


def peer() -> Rows:
    """Decomposition and forward beside tensorly-torch's, one thread."""
    if tltorch is None:
        print("peer: tensorly-torch is not installed; left out")
        return []
    torch.set_num_threads(1)
    dense = nn.Conv2d(64, 128, 3, padding=1)
    rows: Rows = []
    for weight_name, weight in (("decaying", kernel(128, 64)), ("gaussian", torch.randn(128, 64, 3, 3))):
        dense.weight.data.copy_(weight)
        for factorization in ("cp", "tucker"):
            torch.manual_seed(0)
            decompose = partial(
                tltorch.FactorizedConv.from_conv,
                dense,
                rank=0.25,
                factorization=factorization,
                implementation="factorized",
                decompose_weights=True,
            )
            theirs = decompose()
            with torch.no_grad():
                their_dense = theirs.weight.to_tensor()  # type: ignore[attr-defined]
            count = (
                sum(factor.numel() for factor in theirs.weight.decomposition_parameters())
                if hasattr(theirs.weight, "decomposition_parameters")
                else sum(parameter.numel() for parameter in theirs.weight.parameters())
            )  # type: ignore[attr-defined]
            ours = _ours(factorization, weight.shape, count)
            member = ours.fit(weight)
            fits = time_alternating({"theirs": decompose, "ours": partial(ours.fit, weight)}, least=3)
            our_seconds, their_seconds = fits["ours"].median, fits["theirs"].median
            layer = StructuredConvolution(member, geometry_of(dense), dense.bias).eval()
            for size, batch in ((32, 1), (56, 1), (32, 16)):
                x = torch.randn(batch, 64, size, size)
                calls = {"dense": partial(dense, x), "theirs": partial(theirs, x), "ours": partial(layer, x)}
                with torch.inference_mode():
                    timings = time_alternating(calls)
                times = {name: timing.median for name, timing in timings.items()}
                row = {
                    "weight": weight_name,
                    "factorization": factorization,
                    "structure": str(member.structure),
                    "image": size,
                    "batch": batch,
                    "their_numbers": count,
                    "our_numbers": member.cost().parameters,
                    "their_decomposition_seconds": their_seconds,
                    "our_decomposition_seconds": our_seconds,
                    "their_error": relative_error(weight, their_dense),
                    "our_error": relative_error(weight, member.to_dense()),
                    **{f"{name}_seconds": value for name, value in times.items()},
                    "over_theirs": times["ours"] / times["theirs"],
                    "over_dense": times["ours"] / times["dense"],
                }
                rows.append(row)
                print(
                    f"{weight_name:9} {factorization:6} {size}² batch {batch:2}: "
                    f"decomposed in {1e3 * our_seconds:.1f} ms (theirs {1e3 * their_seconds:.1f}), "
                    f"error {row['our_error']:.4f} (theirs {row['their_error']:.4f}), "
                    f"forward {1e3 * times['ours']:.2f} ms (theirs {1e3 * times['theirs']:.2f}, "
                    f"dense {1e3 * times['dense']:.2f})",
                    flush=True,
                )
    return rows


def _ours(factorization: str, shape: torch.Size, numbers: int) -> Structure:
    """The largest member with at most as many numbers."""
    if factorization == "cp":
        return CanonicalPolyadic(numbers // CanonicalPolyadic(1).parameter_count(tuple(shape)))
    shares = [step / 256 for step in range(1, 257)]
    counts = [Tucker(share).parameter_count(tuple(shape)) or 0 for share in shares]
    return Tucker(max(share for share, count in zip(shares, counts, strict=True) if count <= numbers))


def structures(channels: int, geometry: Geometry) -> dict[str, Structure]:
    """The largest member of every family with at most SHARE of the dense multiply-adds."""
    shape = (channels, channels, 3, 3)
    limit = SHARE * channels * channels * 9 * geometry.positions((3, 3))

    def most(make: Callable[[int], Structure], high: int) -> Structure:
        low = 1
        while low < high:
            middle = (low + high + 1) // 2
            counted = make(middle).multiply_adds(shape, geometry)
            assert counted is not None
            low, high = (middle, high) if counted <= limit else (low, middle - 1)
        return make(low)

    return {
        "LowRank": most(LowRank, channels),
        "Separable": most(Separable, 3 * channels),
        "Tucker": most(lambda rank: Tucker((rank, rank)), channels - 1),
        "Tucker, channels": most(lambda rank: Tucker((channels, rank)), channels - 1),
        "CanonicalPolyadic": most(CanonicalPolyadic, 9 * channels),
    }


def layers() -> Rows:
    """Single layers at half the multiply-adds against dense ones."""
    rows: Rows = []
    for count in (1, 2):
        for channels, size in LAYERS:
            dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
            geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), input_size=(size, size))
            chosen = structures(channels, geometry)
            members = {
                name: StructuredConvolution(
                    structure.initialise(tuple(dense.weight.shape)), geometry, dense.bias
                )
                for name, structure in chosen.items()
            }
            for batch in (1, 64):
                x = torch.randn(batch, channels, size, size)
                calls = {"dense": partial(dense, x)} | {
                    name: partial(layer.eval(), x) for name, layer in members.items()
                }
                with threads(count), torch.inference_mode():
                    timings = time_alternating(calls, seconds=0.8 if batch == 1 else 2.4, least=5)
                times = {name: timing.median for name, timing in timings.items()}
                for name, structure in chosen.items():
                    multiply_adds = structure.multiply_adds(tuple(dense.weight.shape), geometry) or 0
                    rows.append({
                        "channels": channels,
                        "image": size,
                        "batch": batch,
                        "threads": count,
                        "family": name,
                        "structure": str(structure),
                        "multiply_adds_share": multiply_adds / (dense.weight.numel() * size * size),
                        "dense_seconds": times["dense"],
                        "seconds": times[name],
                        "over_dense": times[name] / times["dense"],
                    })
                shown = "  ".join(f"{name} {times[name] / times['dense']:.2f}" for name in chosen)
                print(
                    f"{channels}→{channels} {size}² batch {batch:2} threads {count}: "
                    f"dense {1e3 * times['dense']:.2f} ms  {shown}",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    parts.run(__file__, __doc__, {"peer": peer, "layers": layers}, packages=("tensorly", "tensorly-torch"))
