"""A checkpoint larger than memory: `weft survey`, `plan` and `compress --shards` under a bound on memory.

Makes a random checkpoint shard by shard in a temporary folder (a table and blocks like a language model's),
runs the three verbs in processes of their own whose private memory the kernel bounds, and reports the peak
resident memory of each beside the law: three times the largest layer plus what `import weft` takes.

    python benchmarks/shards.py --gigabytes 8 --limit 2
"""

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weft.bench import surroundings
from weft.checkpoint import INDEX, Checkpoint

HERE = Path(__file__).parent
SHARD = 512 * 2**20  # bytes of a shard of the dense checkpoint
CONSTANT = 256 * 2**20  # the law's constant beyond the import: written shards (128 MiB) and pieces


def shapes(width: int, table: int, size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a language model's weights that take about `size` bytes in float32."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (table, width)}
    # Wide and tall: a factorisation's time grows with the shorter side, the memory at stake with the area.
    block = {
        "attention.weight": (width, 48 * width),
        "output.weight": (width, 16 * width),
        "up.weight": (128 * width, width),
        "down.weight": (width, 128 * width),
        "norm.weight": (4 * width,),
    }
    total = table * width * 4
    for number in range(10**6):
        own = sum(math.prod(shape) for shape in block.values()) * 4
        if number and total + own > size:
            break
        total += own
        found |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return found


def make(folder: Path, wanted: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Writes the checkpoint."""
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in wanted.items():
        own = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + own > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(wanted[name], generator=generator).to(dtype) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def peak(command: list[str], limit: int | None, cache: Path) -> dict[str, Any]:
    """Runs `weft` in a process of its own; its peak resident memory in bytes, and seconds."""
    start = time.perf_counter()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        environment = {**os.environ, "WEFT_CACHE": str(cache)}
        program = "from weft.cli import main; main()"
        os.execve(sys.executable, [sys.executable, "-c", program, *command], environment)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"weft {' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of memory that a process may take")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--table", type=int, default=262144, help="rows of the largest weight")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--families", default="LowRank")
    parser.add_argument("--budget", default="bytes=0.25")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint in place of a random one")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "shards.json")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    size, limit = int(given.gigabytes * 1e9), int(given.limit * 2**30)
    wanted = shapes(given.width, given.table, size * 4 // dtype.itemsize)
    with tempfile.TemporaryDirectory(prefix="weft-shards-", dir=given.folder) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < 1.6 * size:
            sys.exit(
                f"{folder} has {free:,} bytes free; the checkpoint and its result take {1.6 * size:,.0f}"
            )
        dense, small = folder / "dense", folder / "small"
        if given.checkpoint is None:
            # In a process of its own: a child's peak is never below that of the process it comes from.
            dense.mkdir()
            maker = get_context("spawn").Process(target=make, args=(dense, wanted, dtype))
            maker.start()
            maker.join()
        else:
            dense = given.checkpoint
        largest = max(tensor.nbytes for tensor in Checkpoint(dense).tensors.values())
        total = sum(file.stat().st_size for file in dense.iterdir())
        survey, plan, cache = str(folder / "survey.json"), str(folder / "plan.json"), folder / "cache"
        asked = ["--families", given.families, "--budget", given.budget, "--workers", "1"]
        commands = {
            "import": ["--version"],
            "survey": ["survey", "--shards", str(dense), "-o", survey],
            "plan": ["plan", survey, *asked, "-o", plan],
            "compress": ["compress", plan, "-o", str(small)],
        }
        rows = {}
        for verb, command in commands.items():
            rows[verb] = peak(command, limit, cache)
            row = rows[verb]
            print(f"{verb:9} {row['peak_bytes'] / 2**20:6.0f} MiB {row['seconds']:8.1f} s", flush=True)
        written = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    law = 3 * largest + rows["import"]["peak_bytes"] + CONSTANT
    print(f"checkpoint {total:,} bytes, compressed {written:,}; largest layer {largest / 2**20:.0f} MiB;")
    print(f"the law allows {law / 2**20:.0f} MiB, the limit {limit / 2**20:.0f} MiB")
    held = all(row["peak_bytes"] <= min(law, limit) for row in rows.values())
    result = {
        "environment": surroundings(),
        "checkpoint_bytes": total,
        "compressed_bytes": written,
        "largest_layer_bytes": largest,
        "law_bytes": law,
        "limit_bytes": limit,
        "dtype": given.dtype,
        "families": given.families,
        "verbs": rows,
        "held": held,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if held else "peak memory is beyond the law or the limit")


if __name__ == "__main__":
    main()
