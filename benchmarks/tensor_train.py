"""TensorTrain against tensorly-torch's BlockTT and the dense layer, in one run.

    python benchmarks/tensor_train.py             # --parts linear for one

tensorly-torch takes part where it is installed (`pip install tensorly==0.10.0 tensorly-torch==0.5.0`), else
its rows are left out. What is compared is called in turns; times are medians.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import parts
import torch
from parts import Rows
from torch import Tensor, nn

from weft.layers.replace import structured_layer
from weft.measure import footprint, peak_activations, threads, time_alternating
from weft.structures.base import DenseGram, Geometry, relative_error
from weft.structures.low_rank import LowRank
from weft.structures.separable import Separable
from weft.structures.tensor_train import TensorTrain
from weft.structures.tucker import Tucker

try:
    import tensorly
    import tltorch

    tensorly.set_backend("pytorch")
except ImportError:
    tltorch = None

SHARE = 0.1
FEATURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_features" / "mobilenet_v2.npz"


def weights() -> dict[str, Tensor]:
    """1024×1024: normal numbers, and decaying singular values as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1024, 1024, generator=generator)
    left, _, right = torch.linalg.svd(noise)
    decay = torch.arange(1, 1025) ** -0.75
    return {"gaussian": noise / 32, "decaying": (left * decay) @ right}


def ours(shape: tuple[int, ...], **options: str) -> TensorTrain:
    """The largest train within the share of the parameters."""
    dense = int(np.prod(shape))
    rank = max(
        rank for rank in range(1, 400) if TensorTrain(rank, **options).parameter_count(shape) <= SHARE * dense
    )
    return TensorTrain(rank, **options)


def theirs(layer: nn.Linear, modes: int) -> nn.Module:
    return tltorch.FactorizedLinear.from_linear(
        layer,
        auto_tensorize=True,
        n_tensorized_modes=modes,
        rank=SHARE,
        factorization="blocktt",
        implementation="factorized",
    )


def kept(module: nn.Module) -> int:
    """Bytes in memory beside the stored tensors."""
    held = footprint(module)
    return held.memory - held.stored


def linear() -> Rows:
    """Decomposition and forward pass of a 1024×1024 layer at 10 % of its parameters."""
    rows: Rows = []
    for kind, weight in weights().items():
        layer = nn.Linear(1024, 1024)
        layer.weight.data = weight
        made: dict[str, nn.Module] = {}

        def fit(name: str, structure: TensorTrain, layer: nn.Linear = layer, made: dict = made) -> None:
            made[name] = structured_layer(layer, structure.fit(layer.weight)).eval()

        def decompose(name: str, modes: int, layer: nn.Linear = layer, made: dict = made) -> None:
            made[name] = theirs(layer, modes).eval()

        calls: dict[str, Callable[[], object]] = {
            f"weft {modes} {method}": partial(
                fit, f"weft {modes} {method}", ours((1024, 1024), modes=modes, method=method)
            )
            for modes in ("skewed", "balanced")
            for method in ("svd", "randomized")
        }
        if tltorch is not None:
            for modes in (3, 4):
                name = f"tensorly-torch BlockTT, {modes} modes"
                calls[name] = partial(decompose, name, modes)
        for count in (1, 2):
            with threads(count):
                fits = time_alternating(calls, seconds=2.5, least=5, most=15)
                for name, timing in fits.items():
                    module = made[name]
                    dense = module.matrix.to_dense() if name.startswith("weft") else module.weight.to_matrix()
                    parameters = sum(p.numel() for p in module.parameters()) - 1024
                    rows.append({
                        "part": "decomposition",
                        "weight": kind,
                        "threads": count,
                        "method": name,
                        "parameters": parameters,
                        "error": relative_error(weight, dense),
                        "seconds": timing.median,
                    })
                    print(
                        kind, count, f"{name:36} {parameters} {rows[-1]['error']:.4f} {timing.median:.4f} s"
                    )
        if kind != "gaussian":
            continue
        modules: dict[str, nn.Module] = {"dense": layer, **made}
        for count in (1, 2):
            for batch in (1, 64):
                x = torch.randn(batch, 1024)
                with threads(count), torch.inference_mode():
                    times = time_alternating(
                        {name: partial(module, x) for name, module in modules.items()}, seconds=2, most=400
                    )
                for name, timing in times.items():
                    activations = peak_activations(modules[name], x)
                    rows.append({
                        "part": "forward",
                        "threads": count,
                        "batch": batch,
                        "method": name,
                        "seconds": timing.median,
                        "over_dense": timing.median / times["dense"].median,
                        "activation_bytes_per_sample": activations,
                        "kept_bytes": kept(modules[name]),
                    })
                    print(
                        f"threads {count} batch {batch:3} {name:36} {1e3 * timing.median:7.3f} ms "
                        f"{rows[-1]['over_dense']:5.2f} x dense, {activations} B per sample"
                    )
    return rows


def convolutions() -> Rows:
    """Layers of ResNet-50's size as trains at 10 and 25 % of the parameters, batch 32."""
    rows: Rows = []
    global SHARE
    for channels, size in ((512, 7), (256, 14)):
        shape, x = (channels, channels, 3, 3), torch.randn(32, channels, size, size)
        dense = nn.Conv2d(channels, channels, 3, padding=1)
        geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), input_size=(size, size))
        for share in (0.1, 0.25):
            SHARE = share
            structure = ours(shape)
            layer = structured_layer(dense, structure.initialise(shape)).eval()
            rank = int(share * dense.weight.numel() / (channels * 10))
            low_rank = structured_layer(dense, LowRank(rank).initialise(shape)).eval()
            modules = {"dense": dense, "tensor train": layer, "low rank": low_rank}
            for count in (1, 2):
                with threads(count), torch.inference_mode():
                    times = time_alternating(
                        {name: partial(module, x) for name, module in modules.items()}, seconds=1.5, least=10
                    )
                for name, timing in times.items():
                    activations = peak_activations(modules[name], x)
                    rows.append({
                        "shape": shape,
                        "size": size,
                        "share": share,
                        "threads": count,
                        "method": name,
                        "structure": str(structure) if name == "tensor train" else name,
                        "runs_as_chain": structure.runs_as_chain(shape, geometry),
                        "multiply_adds_over_dense": structure.multiply_adds(shape, geometry)
                        / (dense.weight.numel() * size * size),
                        "seconds": timing.median,
                        "over_dense": timing.median / times["dense"].median,
                        "activation_bytes_per_image": activations,
                        "activations_over_input": activations / x[0].nbytes,
                        # The hidden representation where one core is applied after the other.
                        "core_by_core_over_input": structure.rank if name == "tensor train" else None,
                        "kept_bytes": kept(modules[name]),
                    })
                    print(
                        f"{channels} at {size}, {share:.0%}, threads {count} {name} {1e3 * timing.median:.1f}"
                        f" ms, {rows[-1]['over_dense']:.2f} x dense, activations "
                        f"{rows[-1]['activations_over_input']:.1f} x input, keeps {kept(modules[name])} B"
                    )
    SHARE = 0.1
    return rows


def peers() -> Rows:
    """tensorly-torch's TT convolution, where it runs, beside ours: 64 to 128 channels at 32², batch 8."""
    rows: Rows = []
    torch.manual_seed(0)
    dense, x = nn.Conv2d(64, 128, 3, padding=1), torch.randn(8, 64, 32, 32)
    shape = tuple(dense.weight.shape)
    for share in (0.1, 0.5):
        made: dict[str, nn.Module] = {"dense": dense}
        outcome = "not installed"
        if tltorch is not None:
            try:
                layer = tltorch.FactorizedConv.from_conv(
                    dense, rank=share, factorization="tt", implementation="factorized"
                )
                layer(x)
                made["tensorly-torch TT"], outcome = layer, "runs"
            except (RuntimeError, ValueError, TypeError) as error:
                outcome = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        # Its train is that of the four-way kernel, and smaller than asked for: ours gets as many parameters.
        count = sum(p.numel() for p in made.get("tensorly-torch TT", dense).parameters()) - 128
        # With its spatial cores taken together that train is Tucker-2; Separable keeps them apart.
        trains = [TensorTrain(rank) for rank in range(1, 64)]
        tuckers = [Tucker((2 * rank, rank)) for rank in range(1, 64)]
        separables = [Separable(rank) for rank in range(1, 64)]
        members = {"TensorTrain": trains, "Tucker": tuckers, "Separable": separables}
        for label, structures in members.items():
            largest = max(
                (s for s in structures if (s.parameter_count(shape) or 0) <= count),
                key=lambda s: s.parameter_count(shape) or 0,
            )
            made[f"weft {label}"] = structured_layer(dense, largest.fit(dense.weight)).eval()
        rows.append({"method": "tensorly-torch TT", "share": share, "outcome": outcome})
        print("tensorly-torch TT convolution:", outcome)
        with threads(1), torch.inference_mode():
            times = time_alternating({name: partial(module, x) for name, module in made.items()}, seconds=4)
        for name, timing in times.items():
            module = made[name]
            kernel = module.matrix.to_dense() if name.startswith("weft") else module.weight
            if name == "tensorly-torch TT":
                kernel = module.weight.to_tensor()
            rows.append({
                "shape": shape,
                "share": share,
                "method": name,
                "parameters": sum(p.numel() for p in module.parameters()) - 128,
                "error": relative_error(dense.weight, kernel),
                "seconds": timing.median,
                "over_dense": timing.median / times["dense"].median,
                "activation_bytes_per_image": peak_activations(module, x),
            })
            print(rows[-1])
    return rows


def classifier() -> Rows:
    """Trains of MobileNetV2's classifier by modes, plain and weighted: error and top-1."""
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
    torch.set_num_threads(1)
    for rank in (40, 80):
        for modes in ("skewed", "balanced"):
            for kind, grams in (("plain", {}), ("weighted", {"input_gram": gram})):
                start = time.perf_counter()
                member = TensorTrain(rank, modes=modes).fit(weight, **grams)
                seconds = time.perf_counter() - start
                dense = member.to_dense().detach()
                rows.append({
                    "structure": str(member.structure),
                    "share": member.parameter_count() / weight.numel(),
                    "fit": kind,
                    "seconds": seconds,
                    "relative_error": relative_error(weight, dense),
                    "weighted_error": relative_error(weight, dense, input_gram=gram),
                    "top1": float(((held_out @ dense.T + bias).argmax(1) == labels).float().mean()),
                })
                print({**rows[-1], "structure": f"{rank} {modes}"}, flush=True)
    return rows


if __name__ == "__main__":
    measured = {"linear": linear, "convolutions": convolutions, "peers": peers, "classifier": classifier}
    parts.run(__file__, __doc__, measured, packages=("tensorly", "tensorly-torch"))
