"""The pages of real runs, and what they look like: docs/screenshots/*.png.

    python experiments/pages.py                  # MiniLM by bytes, ResNet-20 by multiply-adds
    python experiments/pages.py resnet20
    python experiments/pages.py --screenshots    # only of pages that are there; needs Chromium: make browser

Runs and pages go to build/pages; steps whose files are there are not done again. Skips with a message where
packages or data are absent.
"""

import argparse
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import sentences
from data import shared_file
from torch import nn

import weft
from weft.plan.error_curves import error_curves
from weft.structures import select

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
SCREENSHOTS = ROOT / "docs" / "screenshots"
CURVES = ROOT / "build" / "planner"  # where experiments/planner.py keeps them too
MINILM_FAMILIES = ("LowRank", "Quantized")


def minilm() -> None:
    """A sentence encoder at 14 % of its bytes and 80 % of its multiply-adds, of two families, untrained."""
    model = sentences.sentence_encoder()
    calibration, held_out = sentences.calibration_and_evaluation()
    reference = sentences.embeddings(model, held_out)

    def cosine(network: nn.Module, _: object) -> float:
        return sentences.agreement(sentences.embeddings(network, held_out), reference)["cosine"]

    surveyed = PAGES / "minilm_survey.json"
    if surveyed.exists():
        found = weft.Survey.load(surveyed, model)
    else:
        found = weft.survey(model, calibration, loss="squared")
        found.save(surveyed)
    budget = weft.Budget(bytes=0.141, multiply_adds=0.8)
    # Each family by itself: their combinations would take an hour more.
    own = [error_curves(found, select(family), cache=CURVES) for family in MINILM_FAMILIES]
    curves = {name: [point for curve in own for point in curve[name]] for name in found.layers}
    plan = weft.allocate(found, MINILM_FAMILIES, budget, curves=curves)
    plan.save(PAGES / "minilm_plan.json")
    small, log = weft.compress(model, plan, found, batches=calibration)
    report = weft.measure(
        small,
        against=model,
        data=[(batch, batch[0]) for batch in held_out],
        metric=cosine,
        batches=(1, 16),
        seconds=2.0,
    )
    assert plan.pareto is not None
    told = {
        "command": shlex.join(["python", "experiments/pages.py", "minilm"]),
        "asked": f"{budget.in_words()}, from {', '.join(MINILM_FAMILIES)}",
    }
    report.save(PAGES / "minilm.json", **told)
    report.write_html(
        PAGES / "minilm.html",
        title="MiniLM sentence embeddings",
        log=log,
        pareto=plan.pareto.to_json(),
        others=plan.others,
        **told,
    )
    print(report)


def resnet20() -> None:
    """ResNet-20 at half of its multiply-adds with an epoch of training, and at 35 % without, by the shell."""
    weights, data = os.path.relpath(shared_file("cifar10/resnet20.npz"), ROOT), "experiments/data.py:cifar10"
    out = os.path.relpath(PAGES, ROOT)
    families = "LowRank,Separable,Tucker"
    _weft(
        [
            "survey",
            "experiments/models.py:resnet20",
            "--weights",
            weights,
            "--data",
            data,
            "--samples",
            "1000",
        ],
        f"{out}/survey.json",
    )
    for name, share in (("half", "0.5"), ("third", "0.35")):
        budget = ["--budget", f"multiply_adds={share}", "--families", families]
        _weft(["plan", f"{out}/survey.json", *budget], f"{out}/{name}_plan.json")
        _weft(["compress", f"{out}/{name}_plan.json", "--data", data], f"{out}/{name}.safetensors")
    tuning = ["--epochs", "1", "--learning-rate", "1e-4", "--log", f"{out}/half.jsonl"]
    _weft(["finetune", f"{out}/half.safetensors", "--data", data, *tuning], f"{out}/tuned.safetensors")
    for name, file in (("resnet20", "tuned"), ("resnet20_third", "third")):
        evaluated = ["evaluate", f"{out}/{file}.safetensors", "--data", data, "--limit", "1000"]
        _weft(evaluated, f"{out}/{name}.json")
    told = [
        "--title",
        "ResNet-20 on CIFAR-10",
        "--plan",
        f"{out}/half_plan.json",
        "--log",
        f"{out}/half.jsonl",
    ]
    _weft(["report", f"{out}/resnet20.json", *told], f"{out}/resnet20.html", anew=True)
    compared = ["report", f"{out}/resnet20.json", f"{out}/resnet20_third.json"]
    _weft(compared, f"{out}/compared.html", anew=True)


def _weft(arguments: Sequence[str], output: str, *, anew: bool = False) -> None:
    """One command in the root folder, unless what it writes is there."""
    if anew or not (ROOT / output).exists():
        print(shlex.join(["weft", *arguments, "-o", output]), flush=True)
        command = [str(Path(sys.executable).parent / "weft"), *arguments, "-o", output]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def screenshots() -> None:
    """Pages as they look at 1400 pixels in light and at 400 in dark colours, one layer open."""
    sys.path.insert(0, str(ROOT))
    from PIL import Image
    from tests.browser import chromium, look

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for page in sorted(PAGES.glob("*.html")):
            for width, scheme in ((1400, "light"), (400, "dark")):
                picture = look(browser, page, width, scheme, open_layer=1)
                path = SCREENSHOTS / f"{page.stem}_{width}.png"
                # Of 256 colours: a third of the size; the octree keeps those of thin lines too.
                image = Image.open(io.BytesIO(picture)).convert("RGB")
                image.quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)
                print(f"wrote {path}")


RUNS: dict[str, Callable[[], None]] = {"minilm": minilm, "resnet20": resnet20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", choices=[*RUNS, []])
    parser.add_argument("--screenshots", action="store_true")
    given = parser.parse_args()
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in given.run or ([] if given.screenshots else RUNS):
        try:
            RUNS[name]()
        except FileNotFoundError as error:
            print(f"{name}: {error}")
    if given.screenshots:
        screenshots()


if __name__ == "__main__":
    main()
