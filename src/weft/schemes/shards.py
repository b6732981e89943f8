"""Direct compression of a checkpoint that need not fit into memory, from shards to shards."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from weft import checks
from weft.checkpoint import INDEX, Checkpoint, StoredTensor, opened
from weft.plan.plan import check_plan
from weft.plan.workers import run
from weft.progress import track
from weft.schemes.direct import LayerFit, Piece, fit_piece, log_entry
from weft.storage import coder_of, plan_entry, write_network, write_text
from weft.structures.base import Structure
from weft.structures.dense import Dense
from weft.survey import Survey, survey_shards

# What a written shard was at most, before it was compressed, where one tensor alone is not more.
SHARD_BYTES = 128 * 2**20


def compress_shards(
    folder: str | os.PathLike[str],
    plan: Mapping[str, Structure],
    output: str | os.PathLike[str],
    *,
    survey: Survey | None = None,
    source: str = "",
    entropy_coding: bool | str = False,
    workers: int = 1,
    ray: str | None = None,
    worker_memory: int | None = None,
    shown: bool | None = None,
) -> list[dict[str, Any]]:
    """Fits every layer of a plan to its weight in a checkpoint, and writes a checkpoint that `load` reads.

    One layer at a time is in memory (with workers one each, and one to follow), and what a written shard
    consists of: tensors of one shard, that were 128 MiB or one tensor. A shard is written beside its place
    and then renamed, the index last; begun again, the work goes on after the last shard that was written for
    the same plan and files.

    Args:
        folder: safetensors shards with their index, or a single file.
        plan: structures by layer name, from `weft.allocate` or made by hand; all other tensors are copied.
        output: the folder to write; created where only its last part does not exist.
        survey: from `survey_shards`; made where None.
        source: the model source that builds the network, recorded so that `weft.load` needs no model.
        entropy_coding: as `weft.save` has it.
        workers: processes that fit, one thread each.
        ray: "local" or the address of a Ray cluster that sees the same files, in place of the processes.
        worker_memory: bytes that each of them may take; where None, the machine's shared out evenly.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        One log entry per layer, as `compress` gives them, those of an earlier run included.

    Raises:
        ValueError: the plan is for another checkpoint, or the output is the checkpoint itself.

    Examples:
        >>> import tempfile, torch, weft
        >>> from safetensors.torch import save_file
        >>> from weft.structures.low_rank import LowRank
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(model.state_dict(), f"{folder}/model.safetensors")
        ...     log = compress_shards(folder, {"0": LowRank(rank=2)}, f"{folder}/small")
        ...     small = weft.load(f"{folder}/small", model=model)
        >>> small[0].matrix.structure, log[0]["parameters"]
        (LowRank(rank=2, method='svd'), 32)
    """
    coder = coder_of(entropy_coding)
    survey = survey_shards(folder, check=False) if survey is None else survey
    check_plan(plan, survey)
    checkpoint = Checkpoint(folder)
    target = Path(output)
    inside = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if target.resolve() == inside.resolve():
        raise ValueError(checks.fault("output", "another folder than the checkpoint's", target, "choose one"))
    target.mkdir(exist_ok=True)

    layers = {layer.stored.name: layer for layer in survey.layers.values() if layer.stored is not None}
    wanted = {
        name: Piece(layer, plan[layer.name])
        for name, layer in layers.items()
        if not isinstance(plan.get(layer.name, Dense()), Dense)
    }
    groups = list(_groups(checkpoint.tensors.values()))
    count = len(groups)
    files = [target / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    marks = [_mark(group, wanted, coder) for group in groups]
    missing = {
        number: [tensor.name for tensor in groups[number] if tensor.name in wanted]
        for number, file in enumerate(files)
        if not _is_written(file, marks[number])
    }
    if missing:
        (target / INDEX).unlink(missing_ok=True)  # until all shards belong together again
    pieces = [(number, name) for number, names in missing.items() for name in names]
    fits: dict[str, LayerFit] = {}

    def write(number: int) -> None:
        tensors, entries, log = {}, {}, []
        for stored in groups[number]:
            if stored.name not in wanted:
                tensors[stored.name] = stored.read()
                continue
            layer, fit = wanted[stored.name].layer, fits.pop(stored.name)
            prefix = f"{layer.name}.matrix." if layer.name else "matrix."
            tensors |= {prefix + name: part.contiguous() for name, part in fit.matrix.stored().items()}
            entries[layer.name] = plan_entry(layer.names, fit.matrix)
            log.append(log_entry(layer, fit))
        more = {"made_of": marks[number], "log": json.dumps(log)}
        write_network(files[number], tensors, entries, source=source, coder=coder, more=more)

    for number, names in missing.items():
        if not names:
            write(number)
    done = run(
        fit_piece, [wanted[name] for _, name in pieces], workers=workers, ray=ray, memory=worker_memory
    )
    for index, fit in track(done, "compressing", total=len(pieces), shown=shown):
        number, name = pieces[index]
        fits[name] = fit
        missing[number].remove(name)
        if not missing[number]:
            write(number)
    return _write_index(target, files)


def _groups(tensors: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Tensors that are written together: of one shard, as they lie in it."""
    group: list[StoredTensor] = []
    for tensor in tensors:
        full = sum(own.nbytes for own in group) + tensor.nbytes > SHARD_BYTES
        if group and (full or tensor.file != group[-1].file):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _mark(group: Iterable[StoredTensor], wanted: Mapping[str, Piece], coder: str | None) -> str:
    """A hash of what a written shard is made of."""
    parts: list[Any] = [coder]
    for tensor in group:
        state = tensor.file.stat()
        piece = wanted.get(tensor.name)
        asked = None if piece is None else piece.structure.to_json()
        parts.append([tensor.name, tensor.kind, tensor.shape, state.st_size, state.st_mtime_ns, asked])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_written(file: Path, mark: str) -> bool:
    try:
        with opened(file) as inside:
            return inside.metadata().get("made_of") == mark
    except (OSError, ValueError, AttributeError):
        return False


def _write_index(target: Path, files: Iterable[Path]) -> list[dict[str, Any]]:
    """Writes the index; the log is that of all shards."""
    places: dict[str, str] = {}
    log: list[dict[str, Any]] = []
    size = 0
    for file in files:
        with opened(file) as inside:
            places |= dict.fromkeys(inside.keys(), file.name)
            log += json.loads(inside.metadata()["log"])
        size += file.stat().st_size
    metadata = {"format": "weft", "total_size": size}
    write_text(target / INDEX, json.dumps({"metadata": metadata, "weight_map": places}, indent=1))
    return log
