"""The command line: every verb reads the previous one's file and writes the next."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import weft
from weft import checks
from weft.bench import CACHES, compare_layers, compare_networks, members_of_size, record
from weft.checkpoint import WEIGHTS
from weft.demo import demonstrate
from weft.export.onnx import check_onnx, export_onnx
from weft.export.torch_export import export_torch
from weft.kernels import route
from weft.layers.base import StructuredLayer
from weft.measure import quality, quality_name
from weft.plan.advice import Advice, advise
from weft.plan.allocate import METHODS, allocate
from weft.plan.budget import COSTS, Budget, Price
from weft.plan.constraints import Constraints
from weft.plan.curve_cache import default_folder
from weft.plan.error_curves import error_curves
from weft.plan.latency import LatencyTable
from weft.plan.memory import MemoryTable
from weft.plan.plan import Plan
from weft.plan.sensitivity import DIVERGENCES, Sensitivity, measure_sensitivity
from weft.plan.workers import default_workers
from weft.report.picture import write_picture
from weft.report.report import Report, measure, write_comparison
from weft.schemes.direct import compress
from weft.schemes.fine_tune import FineTune, fine_tune
from weft.schemes.iterative_pruning import IterativePruning
from weft.schemes.learning_compression import METRICS, LearningCompression, Priced, Task, rising
from weft.schemes.log import read_log
from weft.schemes.processes import writes_files
from weft.schemes.search import SearchResult, search
from weft.schemes.shards import compress_shards
from weft.schemes.training import OPTIMISERS, SCHEDULES, Training
from weft.sources import Data, load, load_data, load_model, reference
from weft.sources.augmentation import Augmented
from weft.sources.splits import IndexedSplit
from weft.storage import coder_of, read_json, read_metadata, save, structured_layers, write_text
from weft.structures import families, from_text, select
from weft.structures.base import Candidate, Cost, Structure, StructuredMatrix, relative_error
from weft.structures.dense import Dense as DenseStructure
from weft.survey import Survey, survey, survey_shards


def _examples(*commands: str) -> str:
    """The end of a help text, every command on a line of its own so that it can be copied."""
    return "\n".join([
        "\b",
        "Example:" if len(commands) == 1 else "Examples:",
        *(f"  {one}" for one in commands),
    ])


app = typer.Typer(
    help="Trained networks made smaller and faster by re-weaving their weights from structured matrices.",
    epilog=_examples(
        "weft compress model.py:make --weights model.safetensors --data digits --budget bytes=0.25 "
        "-o small.safetensors"
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
SOURCE_FILE = reference.__file__  # which runs models' and data's own files
SCHEMES = ("direct", "lc", "iterative")
_RIVALS = 4  # how many of a layer's families that were not chosen the plan's table names
_RISE = 1000.0  # of the penalty of learning-compression, from the first step to the last
_FAR = 0.3  # relative distance from which on what was learned is mostly lost
_WIDE = 1000  # columns: what a file or a pipe takes without folding

MODEL_HELP = "Model: path/to/file.py:function, torchvision:NAME, timm:NAME, or hf:NAME_OR_DIR."
DATA_HELP = (
    "Data: digits, mnist:DIR, cifar10:DIR, imagefolder:DIR, npz:FILE, hf:NAME, or path/to/file.py:function."
)

Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="Weights for the model: safetensors, npz, or a torch state dict."),
]
DataSource = Annotated[str | None, typer.Option("--data", help=DATA_HELP)]
NeededData = Annotated[str, typer.Option("--data", help=DATA_HELP)]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget", help="Limits, e.g. bytes=0.25 or parameters=0.2,multiply_adds=0.5; shares or numbers."
    ),
]
FamilyNames = Annotated[
    str,
    typer.Option(
        "--families",
        help="Names separated by commas, or all; see weft families.",
    ),
]
Method = Annotated[str, typer.Option("--method", help=f"How the budget is divided: {' or '.join(METHODS)}.")]
KeepDense = Annotated[
    str, typer.Option("--keep-dense", help="Layers that stay as they are, e.g. 'head,encoder.0.*'.")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Families for some layers, e.g. 'encoder.*=LowRank,Quantized'; repeatable."),
]
ScoutFirst = Annotated[
    bool,
    typer.Option(
        "--scout/--no-scout",
        help="Whether families that are hopeless on two layers of a shape, or on part of a tall matrix, are "
        "left out on the rest (never under a limit on time), or everything is tried.",
    ),
]
SensitivityOf = Annotated[
    str,
    typer.Option(
        "--sensitivity",
        help="What a layer's error costs: predicted from the survey, or measured on calibration data as the "
        "squared or kullback_leibler divergence of the output.",
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes that fit; default: one per core.")
]
Ray = Annotated[
    str | None, typer.Option("--ray", help="Fit on Ray instead: local, or the address of a cluster.")
]
WorkerMemory = Annotated[
    float | None,
    typer.Option(
        "--worker-memory",
        help="GiB that each process may take; default: the machine's (a Ray node's) shared out evenly.",
    ),
]
Shards = Annotated[
    Path | None,
    typer.Option(
        "--shards",
        help="In place of a model: a folder of safetensors shards, read one layer at a time; no data.",
    ),
]
LayerNames = Annotated[
    str,
    typer.Option("--layers", help="With --shards: which tensors of two or four axes are layers' weights."),
]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Where curves and times are kept; default: ~/.cache/weft.")
]
LatencyBatch = Annotated[
    int, typer.Option("--latency-batch", min=1, help="Samples per call for a latency budget.")
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential", help="Fit every layer to what the compressed ones before it give; slower, better."
    ),
]
Smallfile = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A network that weft saved: .safetensors, or a folder."),
]
Dense = Annotated[
    str | None, typer.Option("--model", help="The dense network, where FILE does not record its source.")
]
EntropyCoded = Annotated[
    bool,
    typer.Option("--entropy-coding", help="Store in as few bits as the frequencies allow: weft[entropy]."),
]
BatchSizes = Annotated[str, typer.Option("--batches", help="Batch sizes to time, separated by commas.")]
ThreadCounts = Annotated[
    str | None,
    typer.Option("--threads", help="Thread counts to time, separated by commas; default: torch's own."),
]


@app.command(
    "survey",
    epilog=_examples(
        "weft survey torchvision:resnet18 --data imagefolder:photos --samples 512 -o survey.json",
        "weft survey --shards checkpoint -o survey.json",
    ),
)
def survey_command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The survey to write.")] = Path(
        "survey.json"
    ),
    shards: Shards = None,
    layer_names: LayerNames = WEIGHTS,
    weights: Weights = None,
    data: DataSource = None,
    samples: Samples = 1024,
    batch_size: BatchSize = 64,
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher",
            help="Also measure by gradients what an error of each layer's output does to the network's own: "
            "the fits and the plan then weigh errors by it.",
        ),
    ] = False,
    times: Annotated[
        bool,
        typer.Option(
            "--times", help="Also time every layer, and structures of a quarter of its size; needs --data."
        ),
    ] = False,
    latency_batch: LatencyBatch = 1,
    cache: Cache = None,
    gram_memory: Annotated[
        float, typer.Option("--gram-memory", help="GiB for all Grams; those beyond it are in files.")
    ] = 4.0,
    spill: Annotated[
        Path | None, typer.Option("--spill", help="The folder for these files; default: the temporary one.")
    ] = None,
) -> None:
    """Lists a network's layers with their costs, and measures what flows through them."""
    _check_output(output)
    source = _given("MODEL", model, shards)
    if shards is not None:
        _without("--shards", data=data, weights=weights, fisher=fisher, times=times)
        found = survey_shards(shards, layers=layer_names)
        _print_survey(found, None, None)
        found.save(output, shards=(str(shards), layer_names), commands=[_command()])
        console.print(f"wrote {output}")
        return
    network = load_model(source, weights)
    loaded = _load_data(data)
    if times and loaded is None:
        raise ValueError(checks.fault("--data", "given with --times", "none", "add --data"))
    room = int(checks.positive("--gram-memory", gram_memory) * 2**30)
    found = _survey(network, loaded, samples, batch_size, fisher, gram_memory=room, spill=spill)
    advice = table = None
    if times and loaded is not None:
        folder = default_folder() if cache is None else cache
        table = LatencyTable(network, found, loaded.sample_input, batch=latency_batch, cache=folder)
        advice = advise(table, found, select("all"))
    _print_survey(found, advice, None if table is None else table.dense_seconds)
    found.save(output, source=source, weights=_text(weights), commands=[_command()])
    console.print(f"wrote {output}")


@app.command(
    "plan",
    epilog=_examples(
        "weft plan survey.json --budget parameters=0.25 --families LowRank -o plan.json",
        "weft plan --shards checkpoint --budget bytes=0.25 -o plan.json",
    ),
)
def plan_command(
    budget: BudgetText,
    survey_file: Annotated[
        Path | None, typer.Argument(metavar="[SURVEY]", help="What weft survey wrote.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan to write.")] = Path("plan.json"),
    shards: Shards = None,
    layer_names: LayerNames = WEIGHTS,
    chosen: FamilyNames = "LowRank",
    method: Method = "lagrangian",
    keep_dense: KeepDense = "",
    only: Only = None,
    scout: ScoutFirst = True,
    sensitivity: SensitivityOf = "predicted",
    data: DataSource = None,
    samples: Samples = 256,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    ray: Ray = None,
    worker_memory: WorkerMemory = None,
    cache: Cache = None,
    latency_batch: LatencyBatch = 1,
) -> None:
    """Chooses a structure for every layer under a budget; the JSON may be edited by hand."""
    _check_output(output)
    limits = Budget.parse(budget)
    if limits.keep is not None:
        remedy = "use weft compress MODEL --budget keep=..., which measures every step"
        raise ValueError(checks.fault("--budget keep", "left to weft compress", limits.keep, remedy))
    rules, processes = _constraints(keep_dense, only), _Workers(workers, ray, worker_memory)
    survey_name = _given("SURVEY", survey_file, shards)
    if shards is not None:
        network, found = _NO_NETWORK, survey_shards(shards, layers=layer_names)
        origin = {"source": "", "weights": "", "shards": [str(shards), layer_names], "commands": []}
    else:
        network, found, summary = _read_survey(Path(survey_name))
        origin = {key: summary.get(key, []) for key in ("source", "weights", "shards", "commands")}
    if origin["shards"]:
        _without("--shards", data=data)
    planning = _Planning(chosen, method, rules, sensitivity, samples, batch_size, processes, cache, scout)
    planner = _Planner(network, found, _load_data(data), planning, latency_batch)
    plan = planner.plan(limits)
    _print_plan(plan, found)
    origin["commands"] = [*origin["commands"], _command()]
    record = {**plan.to_json(), **origin, "survey": survey_name, "asked": _asked(limits, chosen)}
    write_text(output, json.dumps(record, indent=1))
    console.print(f"wrote {output}")


@app.command(
    "compress",
    epilog=_examples(
        "weft compress plan.json --data digits -o small.safetensors",
        "weft compress model.py:make --data digits --budget bytes=0.25 -o small.safetensors",
        "weft compress model.py:make --data digits --scheme lc --price parameters=1e-5 -o small.safetensors",
        "weft compress plan.json --data digits --scheme iterative --steps 8 --epochs 2 -o small.safetensors",
        "weft compress --shards checkpoint --budget bytes=0.25 -o small",
    ),
)
def compress_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL|PLAN]", help=f"A plan (.json), or a model. {MODEL_HELP}")
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The network to write; with --shards a folder.")
    ] = Path("small.safetensors"),
    shards: Shards = None,
    layer_names: LayerNames = WEIGHTS,
    weights: Weights = None,
    data: DataSource = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="With MODEL: limits, e.g. bytes=0.25.")
    ] = None,
    chosen: FamilyNames = "LowRank",
    method: Method = "lagrangian",
    samples: Samples = 1024,
    batch_size: BatchSize = 64,
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher", help="With MODEL: weigh errors by what they do to the network's output (gradients)."
        ),
    ] = False,
    keep_dense: KeepDense = "",
    only: Only = None,
    scout: ScoutFirst = True,
    sensitivity: SensitivityOf = "predicted",
    sequential: Sequential = False,
    workers: Workers = None,
    ray: Ray = None,
    worker_memory: WorkerMemory = None,
    cache: Cache = None,
    latency_batch: LatencyBatch = 1,
    epochs: Annotated[
        int,
        typer.Option(
            "--epochs",
            min=0,
            help="Passes of training with the dense network as teacher: fine-tuning, or every step.",
        ),
    ] = 0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of the training.")] = 1e-3,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            help="direct: fit once; lc: train and fit in turn (learning-compression); iterative: shrink in "
            "steps (pruning, ranks), with training between them.",
        ),
    ] = "direct",
    price: Annotated[
        str | None,
        typer.Option(
            "--price",
            help="With MODEL and lc, in place of a budget: what cost is worth, e.g. parameters=1e-6 or "
            "multiply_adds=1e-7; families and sizes are then chosen while training.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of lc or iterative.")] = 20,
    penalty: Annotated[
        float | None,
        typer.Option(
            "--penalty",
            help="With lc: the first weight of the distance to the structures; default: 0.01, with a price "
            "0.001.",
        ),
    ] = None,
    penalty_factor: Annotated[
        float | None,
        typer.Option(
            "--penalty-factor",
            help="With lc: by how much it rises per step; default: to a thousand times over all steps, with "
            "a price 1.3.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="With lc: compare weights as they are (weights) or by what layers give out (outputs); "
            "default: outputs, with a price weights.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="With lc or iterative: a folder from which the run goes on."),
    ] = None,
    plan_output: Annotated[
        Path | None,
        typer.Option("--save-plan", help="With MODEL and a budget: also write the plan, for weft report."),
    ] = None,
    entropy_coding: EntropyCoded = False,
) -> None:
    """Fits every layer of a plan, or walks the whole path from a model to a smaller one."""
    checks.one_of("--scheme", scheme, SCHEMES)
    metric = metric or ("outputs" if price is None else "weights")
    checks.one_of("--metric", metric, METRICS)
    if price is not None and (scheme != "lc" or budget is not None or str(model).endswith(".json")):
        remedy = "e.g. weft compress MODEL --data digits --scheme lc --price parameters=1e-6"
        expected = "given with MODEL and --scheme lc, without --budget"
        raise ValueError(checks.fault("--price", expected, price, remedy))
    worth = None if price is None else Price.parse(price)
    if budget is not None:
        Budget.parse(budget)
    select(chosen)
    if epochs and scheme == "direct" and data is None and shards is None:
        raise ValueError(checks.fault("--data", "given with --epochs", "none", "add --data"))
    coder_of(entropy_coding)
    searched = None
    processes = _Workers(workers, ray, worker_memory)
    pool = processes.pool(1)
    is_plan = model is not None and model.endswith(".json")
    record = read_json(str(model), "weft_plan", _PLANNED) if is_plan else {}
    _check_output(output, folder=shards is not None or bool(record.get("shards")))
    if plan_output is not None:
        _check_output(plan_output)
    if record and budget is not None:
        remedy = "plan again for another budget"
        raise ValueError(checks.fault("--budget", "left out with a plan", budget, remedy))
    if shards is not None or record.get("shards"):
        output = output.with_suffix("") if output.suffix == ".safetensors" else output
        left_out = {"data": data, "weights": weights, "fisher": fisher, "epochs": epochs}
        left_out["scheme"] = None if scheme == "direct" else scheme
        _without("--shards", sequential=sequential, sensitivity=sensitivity != "predicted", **left_out)
        origin = record["shards"] if shards is None else (str(shards), layer_names)
        found = survey_shards(origin[0], layers=origin[1], check=not record)
        if record:
            plan = Plan.load(str(model))
        else:
            limits, rules = Budget.parse(_needed_budget(budget)), _constraints(keep_dense, only)
            planning = _Planning(chosen, method, rules, sensitivity, 256, batch_size, processes, cache, scout)
            plan = _Planner(_NO_NETWORK, found, None, planning, latency_batch).plan(limits)
        log = compress_shards(
            origin[0],
            plan,
            output,
            survey=found,
            source="" if record else model or "",
            entropy_coding=entropy_coding,
            **pool,
        )
        _print_plan(plan, found, log)
        console.print(f"wrote {output} ({sum(file.stat().st_size for file in output.iterdir()):,} bytes)")
        return
    model = _given("MODEL", model, None)
    if record:
        plan = Plan.load(model)
        network, found, _ = _read_survey(Path(record["survey"]))
        source, weights_file = record["source"], record["weights"]
        asked, commands = record.get("asked", ""), [*record.get("commands", []), _command()]
        loaded = _load_data(data)
    else:
        commands = [_command()]
        budget = _needed_budget(budget) if worth is None else budget
        network = load_model(model, weights)
        loaded = _load_data(data)
        found = _survey(network, loaded, samples, batch_size, fisher)
        source, weights_file = model, _text(weights)
        if budget is None:
            plan = Plan({})
            asked = f"what is worth its price, {price}, from {chosen}"
        else:
            limits = Budget.parse(budget)
            asked = _asked(limits, chosen)
            rules = _constraints(keep_dense, only)
            planning = _Planning(chosen, method, rules, sensitivity, 256, batch_size, processes, cache, scout)
            planner = _Planner(network, found, loaded, planning, latency_batch)
            if limits.keep is not None:
                searched = planner.search(limits, samples, sequential)
                plan = searched.plan
            else:
                plan = planner.plan(limits)
            if plan_output is not None:
                plan.save(plan_output)
    calibration = (
        None if loaded is None else loaded.inputs("calibration", batch_size=batch_size, limit=samples)
    )
    if scheme != "direct":
        if loaded is None:
            raise ValueError(checks.fault("--data", f"given with --scheme {scheme}", "none", "add --data"))
        training = Training(epochs=epochs or 1, learning_rate=learning_rate)
        tasks: Mapping[str, Task | Structure] = plan
        options: dict[str, Any] = {"teacher": network, "checkpoint": checkpoint}
        batches = loaded.batches("train", batch_size=batch_size, shuffle=True)
        if scheme == "lc":
            if worth is not None:
                tasks = {"*": Priced(chosen, worth, _constraints(keep_dense, only))}
            # Under a price a strong penalty at once would hold every layer where it is: dense.
            first, factor = (1e-2, _RISE ** (1 / max(1, steps - 1))) if worth is None else (1e-3, 1.3)
            given = (
                first if penalty is None else penalty,
                factor if penalty_factor is None else penalty_factor,
            )
            penalties = rising(*given, steps)
            learning = LearningCompression(training, penalties, metric=metric)
            small, log = learning.run(network, tasks, batches, survey=found, **options)
            apart = [entry["distance"] for entry in log if "distance" in entry][-1]
            hint = "; more --steps or a larger --penalty-factor bring them nearer" if apart > _FAR else ""
            console.print(f"at the end weights and structures were {apart:.1%} apart{hint}", highlight=False)
        else:
            iterative = IterativePruning(training, steps=steps)
            small, log = iterative.run(network, plan, batches, calibration=calibration, **options)
        plan, log = _plan_of(small, found), None
    elif searched is None:
        small, log = compress(network, plan, found, batches=calibration, sequential=sequential, **pool)
    else:
        small, log = searched.model, None
    _print_plan(plan, found, log)
    if epochs and scheme == "direct":
        assert loaded is not None  # noqa: S101  (checked before the work)
        small = _tune(small, network, loaded, epochs, learning_rate, batch_size)
    asked += (
        ""
        if scheme == "direct"
        else f"; {scheme} in {_counted(steps, 'step')} of {_counted(epochs or 1, 'epoch')}"
    )
    asked += f"; {_counted(epochs, 'epoch')} of fine-tuning" if scheme == "direct" and epochs else ""
    origin = {"source": source, "weights": weights_file, "asked": asked, "commands": commands}
    save(small, output, entropy_coding=entropy_coding, **origin)
    console.print(f"wrote {output} ({output.stat().st_size:,} bytes)")


@app.command(
    "finetune",
    epilog=_examples(
        "weft finetune small.safetensors --data digits --epochs 3 -o tuned.safetensors",
        "weft finetune small.safetensors --data digits --epochs 50 --validation 0.1 --patience 5 "
        "--learning-rate 1e-3,1e-4,1e-5 --augment shift=1 --checkpoint run  # killed? the same "
        "command goes on",
        "torchrun --nproc-per-node 2 $(which weft) finetune small.safetensors --data digits",
    ),
)
def finetune_command(
    file: Smallfile,
    data: NeededData,
    output: Annotated[Path, typer.Option("-o", "--output", help="The network to write.")] = Path(
        "tuned.safetensors"
    ),
    dense: Dense = None,
    weights: Weights = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training data.")] = 1,
    learning_rate: Annotated[
        str,
        typer.Option(
            "--learning-rate", help="At the start; of several, 1e-3,1e-4, the best after 10 steps is taken."
        ),
    ] = "1e-3",
    optimiser: Annotated[str, typer.Option("--optimiser", help=f"{', '.join(OPTIMISERS)}.")] = "adamw",
    schedule: Annotated[
        str, typer.Option("--schedule", help=f"Of the learning rate: {', '.join(SCHEDULES)}.")
    ] = "cosine",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of the optimiser.")] = 0.0,
    teacher: Annotated[
        bool, typer.Option("--teacher/--labels", help="Learn from the dense network, or from labels alone.")
    ] = True,
    label_share: Annotated[
        float, typer.Option("--label-share", help="With the teacher: the labels' share of the loss.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option("--temperature", help="Softens the teacher's scores.")] = 2.0,
    features: Annotated[
        str, typer.Option("--features", help="Modules whose outputs shall agree too, e.g. 'layer2,layer3'.")
    ] = "",
    validation: Annotated[
        float, typer.Option("--validation", help="Share of the training data held out to validate on.")
    ] = 0.0,
    patience: Annotated[
        int | None,
        typer.Option("--patience", min=1, help="End after so many epochs without gain; keep the best epoch."),
    ] = None,
    augment: Annotated[
        str, typer.Option("--augment", help="Change images at random: shift=2,rotation=10,flip.")
    ] = "",
    batch_size: BatchSize = 64,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches per step.")] = 1,
    clip: Annotated[float | None, typer.Option("--clip", help="The gradient's largest norm.")] = None,
    mixed_precision: Annotated[bool, typer.Option("--amp", help="Compute products in bfloat16.")] = False,
    batch_norm: Annotated[
        bool, typer.Option("--batch-norm", help="First correct batch-norm statistics by the dense network's.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides all that is drawn.")] = 0,
    log: Annotated[
        Path | None,
        typer.Option("--log", help="One JSON line per step; default: in the checkpoint's folder."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="A folder for the state; the same command goes on from there."),
    ] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-seconds", min=0, help="The least time between two checkpoints.")
    ] = 30.0,
    entropy_coding: EntropyCoded = False,
) -> None:
    """Trains a compressed network further, with the dense one as teacher or by labels."""
    _check_output(output)
    coder_of(entropy_coding)
    rates = _rates(learning_rate)
    scheme = FineTune.of(
        epochs=epochs,
        learning_rate=rates[0],
        rates=rates if len(rates) > 1 else (),
        optimiser=optimiser,
        schedule=schedule,
        weight_decay=weight_decay,
        label_share=label_share,
        temperature=temperature,
        features=tuple(name.strip() for name in features.split(",") if name.strip()),
        patience=patience,
        accumulate=accumulate,
        clip=clip,
        mixed_precision=mixed_precision,
        batch_norm=batch_norm,
        seed=seed,
    )
    small, network, source, weights_file = _read_pair(file, dense, weights)
    training, held_out = _training_data(load_data(data), batch_size, validation, seed)
    if augment:
        training = Augmented.parse(training, augment, seed=seed)
    run = {"file": str(file), "data": data, "batch size": batch_size, "validation": validation}
    tuned, entries = scheme.run(
        small,
        training,
        teacher=network if teacher else None,
        validation=held_out,
        log=log,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        described_as={**run, "augment": augment, "teacher": teacher},
    )
    if not writes_files():
        return
    metrics = [entry["metric"] for entry in entries if "metric" in entry]
    if metrics:
        best = max(metrics) if patience else metrics[-1]
        name = quality_name(next(iter(held_out or [])))
        console.print(f"{name} on the {validation:.0%} held out: {best:.4f}", highlight=False)
    asked, commands = _history(file)
    origin = {"source": source, "weights": weights_file, "commands": [*commands, _command()]}
    asked = f"{asked or file.name}; {_counted(epochs, 'epoch')} of fine-tuning"
    save(tuned.eval(), output, entropy_coding=entropy_coding, asked=asked, **origin)
    console.print(f"wrote {output} ({output.stat().st_size:,} bytes)")


@app.command("evaluate", epilog=_examples("weft evaluate small.safetensors --data digits -o run.json"))
def evaluate_command(
    file: Smallfile,
    data: NeededData,
    output: Annotated[Path, typer.Option("-o", "--output", help="The measurement to write.")] = Path(
        "run.json"
    ),
    dense: Dense = None,
    weights: Weights = None,
    batch_size: BatchSize = 128,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many test samples.")] = None,
    batches: BatchSizes = "1,128",
    thread_counts: ThreadCounts = None,
) -> None:
    """Measures a compressed network against the dense one on held-out data."""
    _check_output(output)
    small, network, _, _ = _read_pair(file, dense, weights)
    report = measure(
        small,
        against=network,
        data=load_data(data).batches("test", batch_size=batch_size, limit=limit),
        batches=_numbers("--batches", batches),
        thread_counts=None if thread_counts is None else _numbers("--threads", thread_counts),
    )
    console.print(report.table())
    asked, commands = _history(file)
    report.save(output, command="\n".join([*commands, _command()]), asked=asked)
    console.print(f"wrote {output}")


@app.command(
    "bench",
    epilog=_examples(
        "weft bench small.safetensors --data digits --threads 1,2 -o bench.json",
        "weft bench --layer 1000x1280 --structure 'LowRank(rank=30)' --cache both",
        "weft bench --layer 1000x1280 --families all --share 0.1 --dtype bfloat16",
    ),
)
def bench_command(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A network that weft saved (.safetensors).")
    ] = None,
    data: DataSource = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="In place of FILE: one linear layer, OUTPUTSxINPUTS.")
    ] = None,
    structure: Annotated[
        list[str] | None,
        typer.Option("--structure", help="The layer's, e.g. 'LowRank(rank=30)'; repeatable."),
    ] = None,
    family_names: Annotated[
        str | None,
        typer.Option("--families", help="Or families, names separated by commas, or all, at one --share."),
    ] = None,
    share: Annotated[float, typer.Option("--share", help="Of the bytes, for --families.")] = 0.2,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the layer and its vectors: float32 or bfloat16.")
    ] = "float32",
    dense: Dense = None,
    weights: Weights = None,
    batches: BatchSizes = "1,16,128",
    thread_counts: Annotated[
        str, typer.Option("--threads", help="Numbers of threads, separated by commas.")
    ] = "1,2",
    cache: Annotated[
        str, typer.Option("--cache", help="Whether calls find the caches warm, cold, or both.")
    ] = "warm",
    seconds: Annotated[float, typer.Option("--seconds", help="About how long to time each row.")] = 1.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A JSON file to write.")] = None,
) -> None:
    """Times a network, a layer or families against the dense one, in turns."""
    checks.one_of("--cache", cache, (*CACHES, "both"))
    checks.one_of("--dtype", dtype, _BENCH_DTYPES)
    settings: dict[str, Any] = {
        "batches": _numbers("--batches", batches),
        "thread_counts": _numbers("--threads", thread_counts),
        "caches": [name for name in CACHES if cache in {name, "both"}],
        "seconds": checks.positive("--seconds", seconds),
    }
    if output is not None:
        _check_output(output)
    if (file is None) == (layer is None):
        got = "both" if file is not None else "neither"
        remedy = "e.g. weft bench small.safetensors --data digits, or weft bench --layer 1000x1280 ..."
        raise ValueError(checks.fault("FILE or --layer", "one of the two", got, remedy))
    if file is not None:
        if dtype != "float32":
            remedy = "leave it out: a network runs in the dtype that it was saved in"
            raise ValueError(checks.fault("--dtype", "given for --layer only", dtype, remedy))
        if data is None:
            raise ValueError(checks.fault("--data", "given for FILE", "nothing", "e.g. --data digits"))
        small, network, _, _ = _read_pair(file, dense, weights)
        rows = compare_networks(network, small, load_data(data).sample_input, name=file.name, **settings)
    else:
        members = _bench_members(str(layer), structure or [], family_names, share)
        rows = compare_layers([member.to(_BENCH_DTYPES[dtype]) for member in members], **settings)
    title = f"median microseconds, kernels: {route()}"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("what", overflow="fold", min_width=18)
    for heading in ("batch", "threads", "cache", "dense", "structured", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [
            f"{timing.median * 1e6:.1f} ±{50 * (timing.high - timing.low) / timing.median:.0f}%"
            for timing in (row.dense, row.structured)
        ]
        table.add_row(row.name, str(row.batch), str(row.threads), row.cache, *cells, f"{row.ratio:.3f}")
    console.print(table)
    if output is not None:
        write_text(output, json.dumps(record(rows), indent=1))
        console.print(f"wrote {output}")


_BENCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _bench_members(
    layer: str, structure: list[str], family_names: str | None, share: float
) -> list[StructuredMatrix]:
    """What to time as one layer."""
    sides = layer.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(checks.fault("--layer", "OUTPUTSxINPUTS", repr(layer), "e.g. --layer 1000x1280"))
    shape = (int(sides[0]), int(sides[1]))
    if not structure and family_names is None:
        remedy = "e.g. --structure 'LowRank(rank=30)' or --families all"
        raise ValueError(checks.fault("--structure or --families", "given for --layer", "neither", remedy))
    members = [from_text(text).initialise(shape) for text in structure]
    if family_names is not None:
        found, left_out = members_of_size(select(family_names), shape, checks.share("--share", share))
        members += found
        if left_out:
            console.print(f"left out, because their size is known only after a fit: {', '.join(left_out)}")
    return members


@app.command(
    "report",
    epilog=_examples(
        "weft report run.json --plan plan.json --log log.jsonl -o report.html",
        "weft report quarter.json tenth.json -o compared.html",
    ),
)
def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="What weft evaluate wrote; several are compared.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="The page's title.")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="The plan, whose curves of all families are drawn.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="A training's log, for its curves: what --log wrote.")
    ] = None,
) -> None:
    """Turns a measurement, or several side by side, into one self-contained page."""
    _check_output(output)
    if len(runs) > 1:
        for name, value in (("--plan", plan), ("--log", log)):
            if value is not None:
                remedy = "write a page of its own for that run"
                raise ValueError(checks.fault(name, "left out with several runs", value, remedy))
        write_comparison(runs, output, title=title or "weft: runs compared")
        console.print(f"wrote {output}")
        return
    report, command, asked = Report.load(runs[0])
    planned = None if plan is None else Plan.load(plan)
    if planned is not None and planned.pareto is None:
        remedy = "pass a plan that weft plan wrote"
        raise ValueError(checks.fault("--plan", "a plan with curves", plan, remedy))
    report.write_html(
        output,
        title=title or "weft report",
        command=command,
        asked=asked,
        pareto=None if planned is None or planned.pareto is None else planned.pareto.to_json(),
        others=None if planned is None else planned.others,
        log=[] if log is None else read_log(log),
    )
    console.print(report.table())
    console.print(f"wrote {output}")


@app.command("export", epilog=_examples("weft export small.safetensors --data digits -o small.onnx"))
def export_command(
    file: Smallfile,
    data: NeededData,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .onnx or .pt2 file.")] = Path(
        "small.onnx"
    ),
    dense: Dense = None,
) -> None:
    """Writes the compressed network for onnxruntime (.onnx, checked there) or torch.export (.pt2)."""
    _check_output(output)
    if output.suffix not in {".onnx", ".pt2"}:
        raise ValueError(
            checks.fault("--output", "a .onnx or .pt2 file", output.name, "name it e.g. small.onnx")
        )
    small = load(file, None if dense is None else load_model(dense))
    sample = load_data(data).sample_input
    if output.suffix == ".pt2":
        export_torch(small, sample, output)
        console.print(f"wrote {output} ({output.stat().st_size:,} bytes)")
        return
    export_onnx(small, sample, output)
    difference = check_onnx(output, small, sample)
    console.print(
        f"wrote {output} ({output.stat().st_size:,} bytes); onnxruntime differs by {difference:.1e}"
    )


@app.command("picture", epilog=_examples("weft picture small.safetensors classifier -o classifier.svg"))
def picture_command(
    file: Smallfile,
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="The layer's name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .svg or .png file.")] = Path(
        "picture.svg"
    ),
    dense: Dense = None,
) -> None:
    """Draws the block structure of a layer: low-rank blocks green with their rank, dense blocks red."""
    _check_output(output)
    small = load(file, None if dense is None else load_model(dense))
    names = [name for group in structured_layers(small).values() for name in group]
    checks.one_of("LAYER", layer, names)
    matrix: Any = small.get_submodule(layer)
    write_picture(matrix.matrix, output)
    console.print(f"wrote {output}")


@app.command("families", epilog=_examples("weft families"))
def families_command() -> None:
    """Lists the families of matrices, those of other packages included."""
    table = Table(title_justify="left")
    table.add_column("family")
    table.add_column("what it is")
    table.add_column("source")
    for name, family in families().items():
        table.add_row(name, (family.__doc__ or "").splitlines()[0], family.source)
    console.print(table)


@app.command("demo", epilog=_examples("weft demo --out demo"))
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("demo"),
) -> None:
    """Trains a small network on scikit-learn's digits, compresses it to a quarter, measures and shows it."""
    report = demonstrate(out, say=console.print)
    console.print(report.table())
    console.print(f"open {out / 'report.html'}; try: weft evaluate {out / 'small.safetensors'} --data digits")


# ----------------------------------------------------------------------------------------------------


_PLANNED = "write it with weft plan"
_NO_NETWORK = nn.Identity()  # a checkpoint comes without one; what would need it is refused


def _command() -> str:
    """What was typed."""
    return shlex.join(["weft", *sys.argv[1:]])


def _history(file: Path) -> tuple[str, list[str]]:
    """What a network's file says it was asked for, and the commands that made it."""
    metadata = read_metadata(file)
    return metadata.get("asked", ""), json.loads(metadata.get("commands", "[]"))


def _asked(limits: Budget, families: str) -> str:
    return f"{limits.in_words()}, from {'all families' if families == 'all' else families.replace(',', ', ')}"


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def _given(argument: str, value: object, shards: Path | None) -> str:
    """The argument, which must be there where shards are not, and the other way round."""
    if (value is None) == (shards is None):
        got = "neither" if value is None else "both"
        remedy = "e.g. weft survey model.py:make, or weft survey --shards checkpoint"
        raise ValueError(checks.fault(f"{argument} or --shards", "one of the two", got, remedy))
    return "" if value is None else str(value)


def _without(where: str, **given: object) -> None:
    """Checks that options are not given which need the network itself."""
    for name, value in given.items():
        if value not in {None, False}:
            remedy = "leave it out, or give a model in place of the shards"
            raise ValueError(checks.fault(f"--{name}", f"left out with {where}", value, remedy))


def _needed_budget(budget: str | None) -> str:
    if budget is None:
        remedy = "e.g. --budget bytes=0.25"
        raise ValueError(checks.fault("--budget", "given with a model", "none", remedy))
    return budget


def _load_data(source: str | None) -> Data | None:
    return None if source is None else load_data(source)


def _survey(
    network: nn.Module, data: Data | None, samples: int, batch_size: int, fisher: bool, **options: Any
) -> Survey:
    if data is None:
        if fisher:
            raise ValueError(checks.fault("--data", "given with --fisher", "none", "add --data"))
        return survey(network)
    batches = data.inputs("calibration", batch_size=batch_size, limit=samples)
    # Not by labels drawn from the scores: of a network that is sure of its answers those say next to nothing.
    return survey(network, batches, loss="squared" if fisher else None, **options)


@dataclass(frozen=True)
class _Planning:
    """What the planning options say."""

    families: str
    method: str
    constraints: Constraints
    sensitivity: str
    samples: int
    batch_size: int
    workers: "_Workers"
    cache: Path | None
    scout: bool


@dataclass(frozen=True)
class _Workers:
    """What the options say about processes."""

    count: int | None
    ray: str | None
    gibibytes: float | None

    def pool(self, otherwise: int) -> dict[str, Any]:
        """The arguments for what works in processes; so many where the user gave no number."""
        given = self.gibibytes
        return {
            "workers": self.count or otherwise,
            "ray": self.ray,
            "worker_memory": None
            if given is None
            else int(checks.positive("--worker-memory", given) * 2**30),
        }


class _Planner:
    """Curves, sensitivity and times of one network, made once and only where they are needed."""

    def __init__(
        self, network: nn.Module, found: Survey, data: Data | None, options: _Planning, latency_batch: int
    ) -> None:
        checks.one_of("--sensitivity", options.sensitivity, ("predicted", *DIVERGENCES))
        if options.sensitivity != "predicted" and data is None:
            raise ValueError(checks.fault("--data", "given with --sensitivity", "none", "add --data"))
        self.network, self.found, self.data, self.options = network, found, data, options
        self.latency_batch = latency_batch
        self.cache = default_folder() if options.cache is None else options.cache

    def _prepare(self, limits: Budget) -> dict[str, Any]:
        options = self.options
        curves = error_curves(
            self.found,
            select(options.families),
            constraints=options.constraints,
            costs=limits.costs(),
            scout=options.scout and not limits.timed,
            cache=self.cache,
            **options.workers.pool(default_workers()),
        )
        sensitivity = latency = None
        if options.sensitivity != "predicted" and self.data is not None:
            batches = self.data.inputs("calibration", batch_size=options.batch_size, limit=options.samples)
            sensitivity = measure_sensitivity(
                self.network, self.found, curves, batches, divergence=DIVERGENCES[options.sensitivity]
            )
            _print_sensitivity(sensitivity)
        if limits.latency is not None or limits.latency_seconds is not None:
            if self.data is None:
                raise ValueError(checks.fault("--data", "given with a latency budget", "none", "add --data"))
            latency = LatencyTable(
                self.network,
                self.found,
                self.data.sample_input,
                batch=self.latency_batch,
                cache=self.cache,
            )
        memory = None
        if limits.peak_memory is not None:
            if self.data is None:
                raise ValueError(checks.fault("--data", "given with a memory budget", "none", "add --data"))
            memory = MemoryTable(self.network, self.found, self.data.sample_input)
        return {"curves": curves, "sensitivity": sensitivity, "latency": latency, "memory": memory}

    def plan(self, limits: Budget) -> Plan:
        options = self.options
        return allocate(self.found, options.families, limits, method=options.method, **self._prepare(limits))

    def search(self, limits: Budget, samples: int, sequential: bool) -> SearchResult:
        options = self.options
        if self.data is None:
            raise ValueError(checks.fault("--data", "given with a budget that keeps", "none", "add --data"))
        split = self.data.split("test")
        if not isinstance(split, IndexedSplit):
            remedy = "give data with a test part that can be divided"
            raise ValueError(checks.fault("--data", "no stream", self.data.source, remedy))
        seen, unseen = split.divide(0.5)
        found = search(
            self.network,
            self.found,
            options.families,
            limits,
            evaluate=lambda network: quality(network, seen, shown=False),
            batches=self.data.inputs("calibration", batch_size=options.batch_size, limit=samples),
            sequential=sequential,
            **options.workers.pool(1),
            **self._prepare(limits),
        )
        values = [quality(network, unseen, shown=False) for network in (self.network, found.model)]
        name = quality_name(next(iter(seen)))
        console.print(
            f"{name} on the half of the test data that the search saw: {found.value:.4f} of "
            f"{found.dense_value:.4f}; on the other half: {values[1]:.4f} of {values[0]:.4f}",
            highlight=False,
        )
        return found


def _plan_of(small: nn.Module, found: Survey) -> Plan:
    """What a compressed network consists of; the errors are the distances to the dense network's weights."""
    points = {}
    for name in structured_layers(small):
        layer, own = found.layers[name], small.get_submodule(name)
        assert isinstance(own, StructuredLayer)  # noqa: S101
        cost = layer.per_sample(own.matrix.cost(layer.geometry))
        error = relative_error(layer.weight, own.matrix.to_dense())
        points[name] = Candidate(own.matrix.structure, cost, error)
    total = sum((points[name].cost - found.layers[name].cost for name in points), found.total)
    return Plan({name: point.structure for name, point in points.items()}, expected=points, total=total)


def _constraints(keep_dense: str, only: list[str] | None) -> Constraints:
    wanted = {}
    for text in only or []:
        pattern, separator, names = text.partition("=")
        if not separator or not pattern.strip():
            remedy = "write e.g. --only 'encoder.*=LowRank,Quantized'"
            raise ValueError(checks.fault("--only", "PATTERN=FAMILIES", repr(text), remedy))
        wanted[pattern.strip()] = names
    return Constraints(keep_dense, wanted)


def _print_sensitivity(found: Sensitivity) -> None:
    table = Table(title="what a squared relative error costs", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("layer", overflow="fold")
    for heading in ("squared error", "predicted", "measured"):
        table.add_column(heading, justify="right")
    for name, probes in found.probes.items():
        for index, (square, cost) in enumerate(probes):
            expected = found.predicted[name][index]
            table.add_row(name if not index else "", f"{square:.3f}", f"{expected:.4g}", f"{cost:.4g}")
    console.print(table)
    console.print(f"rank correlation of predicted and measured: {found.correlation:.2f}", highlight=False)


def _read_survey(path: Path) -> tuple[nn.Module, Survey, dict[str, Any]]:
    summary = read_json(path, "weft_survey", "write it with weft survey")
    if summary.get("shards"):
        folder, layer_names = summary["shards"]
        return _NO_NETWORK, survey_shards(folder, layers=layer_names, check=False), summary
    network = load_model(summary["source"], summary["weights"] or None)
    return network, Survey.load(path, network), summary


def _read_pair(file: Path, dense: str | None, weights: Path | None) -> tuple[nn.Module, nn.Module, str, str]:
    """The compressed network, the dense one, and where the dense one comes from."""
    metadata = read_metadata(file)
    source = dense or metadata["source"]
    if not source:
        remedy = "add --model"
        raise ValueError(checks.fault("--model", "given", f"none, and {file} records no source", remedy))
    recorded = metadata["weights"] if dense is None else ""
    weights_file = _text(weights) or recorded
    network = load_model(source, weights_file or None)
    return load(file, network), network, source, weights_file


def _tune(
    small: nn.Module, network: nn.Module, data: Data, epochs: int, learning_rate: float, batch_size: int
) -> nn.Module:
    batches = data.batches("train", batch_size=batch_size, shuffle=True)
    tuned, _ = fine_tune(small, batches, teacher=network, epochs=epochs, learning_rate=learning_rate)
    return tuned.eval()


def _training_data(
    data: Data, batch_size: int, validation: float, seed: int
) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """The training part in an order of its own for every pass, and what is held out of it."""
    if not validation:
        return data.batches("train", batch_size=batch_size, shuffle=True, seed=seed), None
    split = data.split("train")
    if not isinstance(split, IndexedSplit):
        remedy = "give data with a training part that can be divided"
        raise ValueError(checks.fault("--data", "no stream where --validation is given", data.source, remedy))
    held_out, rest = split.divide(checks.share("--validation", validation), batch_size, seed=seed)
    if not rest.examples:
        raise ValueError(checks.fault("--validation", "a share that leaves some", validation, "e.g. 0.1"))
    rest.shuffle, rest.seed = True, seed
    return rest, held_out


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(checks.positive("--learning-rate", float(part)) for part in text.split(","))
    except ValueError:
        expected = "numbers above 0, separated by commas"
        raise ValueError(checks.fault("--learning-rate", expected, repr(text), "e.g. 1e-3")) from None


def _check_output(path: Path, *, folder: bool = False) -> None:
    """Finds out before the work whether its result can be written."""
    parent, remedy = path.absolute().parent, "create the folder first"
    if not parent.is_dir():
        raise FileNotFoundError(checks.fault("--output", "in an existing folder", path, remedy))
    if path.is_dir() and not folder:
        raise IsADirectoryError(checks.fault("--output", "a file", f"the folder {path}", "name a file in it"))
    if not os.access(parent, os.W_OK):
        raise PermissionError(
            checks.fault("--output", "in a folder that may be written to", path, "choose another")
        )


def _numbers(argument: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            checks.fault(argument, "whole numbers separated by commas", text, "e.g. 1,128")
        ) from None
    for number in numbers:
        checks.integer_between(argument, number, 1, None)
    return numbers


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)


def _print_survey(found: Survey, advice: dict[str, Advice] | None, dense_seconds: float | None) -> None:
    table = Table(
        title=f"{_counted(len(found.layers), 'weight')} can be replaced",
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("layer", overflow="fold")
    timed = ("ms", "of time", "at a quarter") if advice and dense_seconds else ()
    for heading in ("shape", "parameters", "of bytes", "multiply-adds", "of all", *timed):
        table.add_column(heading, justify="right")
    total = found.total
    for layer in found.layers.values():
        cost = layer.cost
        table.add_row(
            " = ".join(layer.names),
            "x".join(map(str, layer.shape)),
            f"{cost.parameters:,}",
            f"{cost.bytes / total.bytes:.1%}",
            f"{cost.multiply_adds:,}" if found.samples else "-",
            f"{cost.multiply_adds / total.multiply_adds:.1%}" if total.multiply_adds else "-",
            *(_times(advice[layer.name], dense_seconds) if advice and dense_seconds else ()),
        )
    console.print(table)
    for name, hint in (advice or {}).items():
        if hint.reason is not None:
            console.print(f"{name}: where time counts leave dense, because {hint.reason}", highlight=False)
    adds = f", {total.multiply_adds:,} multiply-adds per sample" if total.multiply_adds else ""
    console.print(f"the network: {total.parameters:,} parameters, {total.bytes:,} bytes{adds}")
    for name, reason in found.left_dense.items():
        console.print(f"{name} left dense, because {reason}", highlight=False)


def _times(advice: Advice, dense_seconds: float) -> tuple[str, str, str]:
    """A layer's time, its share of the network's, and the time ratio of the fastest quarter."""
    fastest = "-" if advice.seconds is None else f"{advice.seconds / advice.dense_seconds:.2f}x"
    return f"{advice.dense_seconds * 1e3:.3f}", f"{advice.dense_seconds / dense_seconds:.1%}", fastest


def _print_plan(plan: Plan, found: Survey, log: list[dict[str, Any]] | None = None) -> None:
    """The chosen structures with their costs as shares of the dense layers', and why others lost."""
    table = Table(title="plan", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("layer", overflow="fold")
    table.add_column("structure", overflow="fold", min_width=16)
    table.add_column("shape", justify="right")
    for name in COSTS:
        table.add_column(name.replace("_", "-"), justify="right")
    table.add_column("error", justify="right")
    measured = {entry["layer"]: entry for entry in log or []}
    slower = []
    total = found.total if log is not None else plan.total  # one edited by hand has no longer the plan's
    for name, structure in plan.items():
        layer, point = found.layers[name], plan.expected.get(name)
        if isinstance(structure, DenseStructure):
            point = Candidate(structure, layer.cost, 0.0)
        cost: Mapping[str, int] = measured.get(name, {} if point is None else asdict(point.cost))
        error = measured[name]["error"] if name in measured else None if point is None else point.error
        dense = asdict(layer.cost)
        if log is not None and total is not None:
            total = total + Cost(*(cost.get(one, dense[one]) for one in COSTS)) - layer.cost
        if cost.get("multiply_adds", 0) > dense["multiply_adds"] > 0:
            slower.append(name)
        table.add_row(
            name,
            str(structure),
            "x".join(map(str, layer.shape)),
            *(f"{cost[one] / dense[one]:.1%}" if one in cost and dense[one] else "-" for one in COSTS),
            "-" if error is None else f"{error:.4f}",
        )
    console.print(table)
    if slower:
        hint = "where time counts too, limit multiply_adds in the budget"
        console.print(f"more multiply-adds than dense: {', '.join(slower)}; {hint}", highlight=False)
    _print_rivals(plan)
    if plan.scouted:
        console.print("left out by scouting (--no-scout tries everything):")
        for left in plan.scouted:
            console.print(f"  {left}", highlight=False)
    if total is not None:
        parts = [
            f"{name.replace('_', '-')} {now:,} ({now / dense:.1%} of dense)"
            for name in COSTS
            if (dense := getattr(found.total, name)) and (now := getattr(total, name)) is not None
        ]
        if plan.peak_memory is not None:
            parts.append(f"at most {plan.peak_memory:,} bytes in memory")
        console.print("the network: " + ", ".join(parts), highlight=False)


def _print_rivals(plan: Plan) -> None:
    """Under the table, one line a layer: the families that came nearest."""
    told = {name: reasons for name, reasons in plan.others.items() if name in plan and reasons}
    if not told:
        return
    console.print("why the others lost: their error at no more cost, or the least that they need")
    for name, reasons in told.items():
        nearest = sorted(reasons.items(), key=lambda reason: (not reason[1].startswith("error"), reason[1]))
        words = [f"{family} {why.partition(' at no more')[0]}" for family, why in nearest[:_RIVALS]]
        more = len(nearest) - len(words)
        rest = f"; {more} more in the plan" if more else ""
        console.print(f"  {name}: {'; '.join(words)}{rest}", highlight=False)


def main() -> None:
    """Runs the command line; what the user can mend is one line on standard error and exit status 2."""
    try:
        app()
    except Exception as error:
        mendable = isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError)
        own = _users_part(error)
        misspelt = isinstance(error, SyntaxError)  # of a file that could not even be read: weft itself was
        if os.environ.get("WEFT_TRACEBACK") or not (mendable or misspelt or own):
            raise
        if mendable:
            where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
            print(f"weft: {' '.join(str(error).split())}{where}", file=sys.stderr)
        else:
            lines = ["weft: a file of yours failed:", *traceback.format_list(own)]
            lines += traceback.format_exception_only(error)
            print("\n".join(line.rstrip() for line in lines), file=sys.stderr)
        sys.exit(2)


def _users_part(error: Exception) -> list[traceback.FrameSummary]:
    """Where in a model's or data's own file an error came up; nothing where that is not its place."""
    frames = traceback.extract_tb(error.__traceback__)
    entered = max(
        (index for index, frame in enumerate(frames) if frame.filename == SOURCE_FILE), default=None
    )
    if entered is None:
        return []
    return [frame for frame in frames[entered + 1 :] if not frame.filename.startswith("<frozen")]


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Shows the version."""
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE  # a table in a file or a pipe is as wide as it is
    if version:
        print(f"weft {weft.__version__} ({route()})")
        raise typer.Exit
