"""The demonstration: a small convolutional network on scikit-learn's digits, trained, compressed, shown."""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch

from weft.plan.allocate import allocate
from weft.plan.budget import Budget
from weft.report.report import Report, measure
from weft.schemes.direct import compress
from weft.schemes.fine_tune import fine_tune
from weft.sources import load, load_data
from weft.storage import save, write_text
from weft.survey import survey

FAMILIES = "LowRank"


def network():
    """A small convolutional network for (1, 8, 8) images of ten digits, with random weights."""
    from torch import nn  # noqa: PLC0415  (this function's text becomes a file of its own)

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 768),
        nn.ReLU(),
        nn.Linear(768, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def demonstrate(
    folder: str | Path, *, say: Callable[[str], object] = print, shown: bool | None = None
) -> Report:
    """Trains, compresses to a quarter of the parameters, fine-tunes, measures, saves and loads back.

    Args:
        folder: where network.py, dense.safetensors, small.safetensors, run.json and report.html are written;
            made if missing.
        say: what is called with every line of the story.
        shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).

    Returns:
        The report.

    Raises:
        RuntimeError: the network that was loaded back does not give the same outputs.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    source = f"{write_text(out / 'network.py', inspect.getsource(network))}:network"
    digits = load_data("digits")
    training = digits.batches("train", batch_size=64, shuffle=True)
    held_out = digits.batches("test", batch_size=128)

    torch.manual_seed(0)
    dense, _ = fine_tune(network(), training, epochs=12, learning_rate=2e-3, shown=shown)
    dense.eval()
    save(dense, out / "dense.safetensors", source=source)
    count = sum(parameter.numel() for parameter in dense.parameters())
    say(f"trained a network of {count:,} parameters on scikit-learn's digits")

    found = survey(dense, digits.inputs("calibration"), shown=shown)
    plan = allocate(found, FAMILIES, Budget(parameters=0.25), shown=shown)
    for name, structure in plan.items():
        say(f"  layer {name:>2} {found.layers[name].shape!s:>16} -> {structure}")
    small, fits = compress(dense, plan, found, batches=digits.inputs("calibration"), shown=shown)
    small, steps = fine_tune(small, training, teacher=dense, epochs=3, learning_rate=1e-4, shown=shown)
    small.eval()

    report = measure(small, against=dense, data=held_out, shown=shown)
    path = save(small, out / "small.safetensors", source=source, weights=str(out / "dense.safetensors"))
    command = f"weft demo --out {out}"
    asked = f"at most 25 % of the parameters, from {FAMILIES}; three epochs of fine-tuning"
    report.save(out / "run.json", command=command, asked=asked)
    report.write_html(
        out / "report.html",
        title="weft demo: scikit-learn's digits",
        command=command,
        asked=asked,
        log=[*fits, *steps],
        pareto=None if plan.pareto is None else plan.pareto.to_json(),
        others=plan.others,
    )

    again = load(path)
    images = next(iter(held_out))[0]
    with torch.no_grad():
        difference = float((again(images) - small(images)).abs().max())
    if difference:
        raise RuntimeError(
            f"the network loaded from {path} differs by {difference} from the one that was saved"
        )
    say(f"loaded {path} back: the outputs for {len(images)} held-out images are bitwise the same")
    return report
