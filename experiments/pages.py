"""The pages of two real runs, and what they look like: docs/screenshots/*.png.

    python experiments/pages.py                  # MiniLM by bytes, ResNet-20 by multiply-adds
    python experiments/pages.py resnet20
    python experiments/pages.py --screenshots    # only of pages that are there; needs Chromium: make browser

Runs and pages go to build/pages. Skips with a message where packages or data are absent.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import planner
import torch
from torch import nn

import weft
from weft.plan.error_curves import error_curves
from weft.report.report import write_comparison
from weft.sources import load_data
from weft.structures import select

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
SCREENSHOTS = ROOT / "docs" / "screenshots"


def minilm() -> None:
    """The planner's sentence encoder at a seventh of its bytes, without training."""
    setting = planner.sentence_encoder()
    plan, families = _planned(setting, "bytes", 0.141)
    small, log = weft.compress(setting.model, plan, setting.survey, batches=setting.calibration)

    def cosine(network: nn.Module, _: object) -> float:
        return setting.evaluate(network)["cosine"]

    report = weft.measure(
        small, against=setting.model, data=setting.calibration, metric=cosine, batches=(1, 16), seconds=4.0
    )
    _write("minilm", "MiniLM sentence embeddings", report, plan, log, families)


def resnet20() -> None:
    """The planner's ResNet-20 at half and at 35 % of its multiply-adds, tuned on 4,000 images."""
    setting = planner.cifar_network()
    data = load_data(f"{planner.HERE / 'data.py'}:cifar10")
    for name, share in (("resnet20", 0.5), ("resnet20_third", 0.35)):
        plan, families = _planned(setting, "multiply_adds", share)
        small, fits = weft.compress(setting.model, plan, setting.survey, batches=setting.calibration)
        torch.manual_seed(0)
        small, steps = weft.fine_tune(
            small,
            data.batches("train", batch_size=64, shuffle=True, limit=4000),
            teacher=setting.model,
            epochs=2,
            learning_rate=1e-3,
            validation=data.batches("test", batch_size=250, limit=1000),
        )
        held_out = data.batches("test", batch_size=250)
        report = weft.measure(
            small.eval(), against=setting.model, data=held_out, batches=(1, 16), seconds=4.0
        )
        _write(name, "ResNet-20 on CIFAR-10", report, plan, [*fits, *steps], families)
    write_comparison([PAGES / "resnet20.json", PAGES / "resnet20_third.json"], PAGES / "compared.html")


def _planned(setting: planner.Setting, limit: str, share: float) -> tuple[weft.Plan, tuple[str, ...]]:
    """The plan, from the curves that experiments/planner.py keeps, and the families that it was offered."""
    groups = setting.families[limit]
    drawn = [error_curves(setting.survey, select(list(names)), cache=planner.CACHE) for names in groups]
    curves = {name: [point for own in drawn for point in own[name]] for name in setting.survey.layers}
    families = tuple(name for names in groups for name in names)
    return weft.allocate(setting.survey, families, weft.Budget(**{limit: share}), curves=curves), families


def _write(
    name: str, title: str, report: weft.Report, plan: weft.Plan, log: list, families: tuple[str, ...]
) -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    assert plan.budget is not None
    assert plan.pareto is not None
    told = {
        "command": shlex.join(["python", "experiments/pages.py", *sys.argv[1:]]),
        "asked": f"{plan.budget.in_words()}, from {', '.join(families)}",
    }
    report.save(PAGES / f"{name}.json", **told)
    curves = plan.pareto.to_json()
    path = report.write_html(
        PAGES / f"{name}.html", title=title, log=log, pareto=curves, others=plan.others, **told
    )
    print(report)
    print(f"wrote {path}")


def screenshots() -> None:
    """Pages as they look at 1400 pixels in light and at 400 in dark colours, one layer open."""
    sys.path.insert(0, str(ROOT))
    from tests.browser import chromium, look

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for page in sorted(PAGES.glob("*.html")):
            for width, scheme in ((1400, "light"), (400, "dark")):
                picture = look(browser, page, width, scheme, open_layer=1)
                path = SCREENSHOTS / f"{page.stem}_{width}.png"
                path.write_bytes(picture)
                print(f"wrote {path}")


RUNS: dict[str, Callable[[], None]] = {"minilm": minilm, "resnet20": resnet20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", choices=[*RUNS, []])
    parser.add_argument("--screenshots", action="store_true")
    given = parser.parse_args()
    for name in given.run or ([] if given.screenshots else RUNS):
        try:
            RUNS[name]()
        except FileNotFoundError as error:
            print(f"{name}: {error}")
    if given.screenshots:
        screenshots()


if __name__ == "__main__":
    main()
