"""What every benchmark of several parts has in common: its arguments, and its file of results."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from weft.bench import surroundings
from weft.storage import write_text

Rows = list[dict[str, object]]


def run(
    file: str, doc: str | None, parts: Mapping[str, Callable[[], Rows]], packages: Iterable[str] = ()
) -> None:
    """Runs the parts that the command line names and writes results/NAME.json; the others stay in the file.

    Args:
        file: the benchmark's own `__file__`.
        doc: its docstring, shown by --help.
        parts: what measures and prints one part, by name.
        packages: whose versions belong to the results.
    """
    name = Path(file).stem
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(file).parent / "results" / f"{name}.json"
    parser.add_argument("--out", type=Path, default=default, help=f"default {default}")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="default all")
    arguments = parser.parse_args()
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for part in arguments.parts:
        setting = {**surroundings(*packages), "command": f"python benchmarks/{name}.py --parts {part}"}
        result[part] = {"environment": setting, "rows": parts[part]()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")
