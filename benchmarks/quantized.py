"""Products with packed codes against the dense layer and other libraries' 8- and 4-bit layers, in one run.

    python benchmarks/quantized.py --out benchmarks/results/quantized.json

Every call is that of a whole module or session, all of one row take turns, and medians are given as ratios to
`nn.Linear` in float32. Of torch, torchao and onnxruntime (arrays bound in advance) the fastest forms that run
here stand beside. Results of weft are compared with the dense product of the weights that they store, so that
no speed is reported for a wrong product.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.bench import surroundings
from weft.kernels import codebook_apply, quantized_apply
from weft.kernels.quantized import dequantize, look_up, pack, quantize_activations
from weft.measure import threads, time_alternating

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    onnxruntime = None

try:
    from torchao import quantization as torchao
except ImportError:
    torchao = None

Call = Callable[[], object]


class Uniform(nn.Module):
    """A layer of uniform levels: codes in `bits` bits, a scale per row or per group."""

    def __init__(self, dense: nn.Linear, bits: int, group: int | None, activations: str) -> None:
        super().__init__()
        weight = dense.weight.detach()
        self.size = (bits, group or weight.shape[1], weight.shape[1])
        self.activations = activations
        parts = weight.unflatten(1, (-1, self.size[1]))
        scales = parts.abs().amax(-1) / max(1, 2 ** (bits - 1) - 1)
        middle = 2 ** (bits - 1)
        codes = (torch.round(parts / scales[..., None]) + middle).clamp(0, 2 * middle - 1)
        self.register_buffer("codes", pack(codes.flatten(1).to(torch.uint8), bits))
        self.scales = nn.Parameter(scales)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return quantized_apply(x, self.codes, self.scales, None, *self.size, self.bias, self.activations)

    def expected(self, x: Tensor) -> Tensor:
        if self.activations == "int8":
            whole, width = quantize_activations(x)
            x = whole * width
        bits, group, inputs = self.size
        weight = dequantize(self.codes, self.scales, None, bits, group, inputs)
        return functional.linear(x.double(), weight.double(), self.bias.double())


class Codebook(nn.Module):
    """A layer whose weights come from one codebook of 2^bits values."""

    def __init__(self, dense: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = dense.weight.detach()
        values = torch.linspace(float(weight.min()), float(weight.max()), 1 << bits)
        codes = torch.bucketize(weight, (values[1:] + values[:-1]) / 2)
        self.size = (bits, weight.shape[1])
        self.register_buffer("codes", pack(codes.to(torch.uint8), bits))
        self.codebook = nn.Parameter(values[None])
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return codebook_apply(x, self.codes, self.codebook, *self.size, self.bias)

    def expected(self, x: Tensor) -> Tensor:
        weight = look_up(self.codes, self.codebook, *self.size)
        return functional.linear(x.double(), weight.double(), self.bias.double())


def ours(dense: nn.Linear) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for bits in (8, 6, 5, 4, 3, 2):
        layers[f"weft {bits} bit"] = Uniform(dense, bits, None, "float")
        layers[f"weft {bits} bit, int8"] = Uniform(dense, bits, None, "int8")
    for bits in (8, 4):
        for group in (128, 32):
            layers[f"weft {bits} bit, group {group}"] = Uniform(dense, bits, group, "float")
            layers[f"weft {bits} bit, group {group}, int8"] = Uniform(dense, bits, group, "int8")
    for bits in (1, 2, 3, 4, 5, 6, 8):
        layers[f"weft codebook {bits} bit"] = Codebook(dense, bits)
    return layers


def of_torch(dense: nn.Linear, x: Tensor) -> dict[str, Call]:
    """torch's own 8-bit layers, and torchao's."""
    weight = dense.weight.detach()
    scales = weight.abs().amax(1) / 127
    codes = torch.round(weight / scales[:, None]).to(torch.int8)
    turned = codes.T

    def integer_product() -> Tensor:
        whole, width = quantize_activations(x)
        return torch._int_mm(whole.to(torch.int8), turned) * (width * scales) + dense.bias

    calls: dict[str, Call] = {
        "torch quantize_dynamic, int8": partial(
            torch.ao.quantization.quantize_dynamic(nn.Sequential(dense), {nn.Linear}, dtype=torch.qint8), x
        ),
        "torch _int_mm, int8": integer_product,
        "torch _weight_int8pack_mm": lambda: torch._weight_int8pack_mm(x, codes, scales) + dense.bias,
    }
    if torchao is not None:
        for name, config in (
            ("torchao 8 bit", torchao.Int8WeightOnlyConfig()),
            ("torchao 8 bit, int8", torchao.Int8DynamicActivationInt8WeightConfig()),
        ):
            outputs, inputs = weight.shape
            layer = nn.Sequential(nn.Linear(inputs, outputs))
            layer[0].load_state_dict(dense.state_dict())
            torchao.quantize_(layer, config)
            calls[name] = partial(layer, x)
    return calls


def of_onnxruntime(dense: nn.Linear, x: Tensor, count: int) -> dict[str, Call]:
    """Sessions with one layer: float32, 8-bit weights with vectors quantised on the way, 4-bit in blocks."""
    if onnxruntime is None:
        return {}
    weight, bias = dense.weight.detach().numpy(), dense.bias.detach().numpy()
    outputs, inputs = weight.shape
    scales = np.abs(weight).max(1) / 127
    codes = np.round(weight / scales[:, None]).astype(np.int8)
    blocks = weight.reshape(outputs, inputs // 32, 32)
    block_scales = np.abs(blocks).max(-1) / 7
    levels = (np.round(blocks / block_scales[..., None]) + 8).clip(0, 15).astype(np.uint8)
    graphs = {
        "onnxruntime float32": (
            [helper.make_node("Gemm", ["x", "w", "bias"], ["y"], transB=1)],
            {"w": weight, "bias": bias},
        ),
        "onnxruntime MatMulInteger, int8": (
            [
                helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "width", "zero"]),
                helper.make_node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
                helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["width", "scales"], ["steps"]),
                helper.make_node("Mul", ["floats", "steps"], ["product"]),
                helper.make_node("Add", ["product", "bias"], ["y"]),
            ],
            {"w": np.ascontiguousarray(codes.T), "scales": scales, "bias": bias},
        ),
    }
    for level, name in ((1, "group 32"), (4, "group 32, int8")):
        graphs[f"onnxruntime MatMulNBits 4 bit, {name}"] = (
            [
                helper.make_node(
                    "MatMulNBits",
                    ["x", "w", "scales", "", "", "bias"],
                    ["y"],
                    domain="com.microsoft",
                    K=inputs,
                    N=outputs,
                    bits=4,
                    block_size=32,
                    accuracy_level=level,
                )
            ],
            {"w": levels[..., ::2] | levels[..., 1::2] << 4, "scales": block_scales.ravel(), "bias": bias},
        )
    calls: dict[str, Call] = {}
    for name, (nodes, tensors) in graphs.items():
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [x.shape[0], inputs])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], outputs])],
            [numpy_helper.from_array(tensor, key) for key, tensor in tensors.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = count
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_ortvalue_output(
            "y", onnxruntime.OrtValue.ortvalue_from_shape_and_type([x.shape[0], outputs], np.float32)
        )
        calls[name] = partial(session.run_with_iobinding, binding)
    return calls


def check(layer: nn.Module, x: Tensor) -> float:
    """The largest error of a result, relative to the largest entry."""
    expected = layer.expected(x)
    error = float((layer(x).double() - expected).abs().max() / expected.abs().max())
    if not error < 1e-5:
        raise RuntimeError(f"{layer} is off by {error:.1e}; no time of it is worth knowing")
    return error


def rows(shape: tuple[int, int], batch: int, count: int, seconds: float) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(shape[1], shape[0])
    dense.load_state_dict({
        "weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5,
        "bias": torch.randn(shape[0], generator=generator),
    })
    x = torch.randn(batch, shape[1], generator=generator)
    layers = ours(dense)
    errors = {name: check(layer, x) for name, layer in layers.items()}
    calls: dict[str, Call] = {"dense": partial(dense, x)}
    calls |= {name: partial(layer, x) for name, layer in layers.items()}
    calls |= of_torch(dense, x) | of_onnxruntime(dense, x, count)
    timings = time_alternating(calls, seconds=seconds, most=20_000)
    result = []
    for name, timing in timings.items():
        row = {
            "shape": list(shape),
            "batch": batch,
            "threads": count,
            "layer": name,
            "over_dense": timing.median / timings["dense"].median,
            "seconds": timing.median,
            "low": timing.low,
            "high": timing.high,
            "calls": timing.calls,
        }
        if name in errors:
            stored = [tensor for key, tensor in layers[name].state_dict().items() if key != "bias"]
            dense_bytes = dense.weight.numel() * 4
            row["bytes_over_dense"] = sum(t.numel() * t.element_size() for t in stored) / dense_bytes
            row["relative_error"] = errors[name]
        result.append(row)
        print(
            f"{shape[0]}x{shape[1]} batch {batch:4} threads {count} {name:44} "
            f"{1e6 * timing.median:9.1f} us {row['over_dense']:7.3f}",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantized.json")
    parser.add_argument("--shapes", nargs="+", default=["1000x1280", "4096x4096"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=15.0, help="per shape, batch and number of threads")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's own, about what it deprecated
    # Rows that were not asked for stay as an earlier run left them.
    kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    fresh: list[dict[str, object]] = []
    with torch.inference_mode():
        for count in arguments.threads:
            with threads(count):
                for text in arguments.shapes:
                    outputs, inputs = (int(size) for size in text.split("x"))
                    for batch in arguments.batches:
                        fresh += rows((outputs, inputs), batch, count, arguments.seconds)
    setting = surroundings("onnxruntime", "torchao", "numpy")
    for row in fresh:
        row["commit"] = setting["commit"]

    def case(row: dict[str, object]) -> tuple:
        return (tuple(row["shape"]), row["batch"], row["threads"])

    measured = {case(row) for row in fresh}
    every = sorted([row for row in kept if case(row) not in measured] + fresh, key=case)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": setting, "rows": every}, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
