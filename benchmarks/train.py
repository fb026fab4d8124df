"""How fast a training step is: btx, what people train with otherwise, and the dense floor, in one run.

    python benchmarks/train.py [--device cuda|cpu] [--shape llama-3.2-1b] [--layers 16] [--rows btx,transformers]
                               [--settings key=value,...] [--baseline OTHER/src] [--minutes 6] [--output FILE]

Packed sequences of random documents, AdamW, clipping; bfloat16 autocast on a GPU, float32 on a CPU. Every candidate is
a process of its own (`train_candidate.py`). On a GPU they run one after the other, each with all of the memory; on a
CPU they take turns, step by step, so that a machine that slows down slows all of them. Reported is the median of
several blocks of steps after the warm-up; compilation and all else that only the first steps take is told apart.

MFU: (4·N + 2·M + 6·L·H·Q·S) FLOPs a token (`training_flops_per_token`) times tokens/s over the device's dense bfloat16
peak; None on devices that `btx.models.peak_flops` does not know.

--baseline times btx's rows a second time with the source tree at that path, on a CPU in turns with this one's, and
tells the ratio; on a machine that others use, --threads 1 --clock cpu counts what each one took of it. Rows are written
to the output file as they come; those of other shapes and machines in it are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train_candidate import Order, Shape

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))  # where btx is not installed
from btx.models.peak_flops import peak_flops  # noqa: E402 - plain Python

BEFORE = "@baseline"
SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128_256, 4096, 800, 32_768, 8192),
    "hidden-512": Shape(512, 1408, 4, 8, 4, 4096, 1024, 200, 4096, 2048),
    "hidden-256": Shape(256, 704, 4, 4, 2, 4096, 1024, 200, 4096, 2048),
}
"""Documents are a fifth of a sequence in all of them."""
SMALL = {
    "cuda": Shape(256, 704, 6, 4, 4, 8192, 1024, 200, 8192, 8192),  # 6.9M parameters
    "cpu": Shape(128, 384, 3, 8, 8, 2048, 256, 64, 512, 512),  # the demo's
}
"""Models whose steps are bound by launching kernels, or by Python."""
EXPERTS, K = 4, 2


@dataclass(frozen=True)
class Row:
    """One candidate of the line-up."""

    what: str
    trainer: str = "btx"
    model: str = "dense"
    """dense; moe: EXPERTS experts, Top-K; floor: dense with K times the feed-forward width, a MoE model's active
    FLOPs; small."""
    trainable: str = "all"
    compiled: bool = False


ROWS = {  # in the order of importance: a run that is cut off has measured the first ones
    "btx": Row("dense, all weights train"),
    "transformers-compile": Row("plain loop under torch.compile, no document mask", "transformers", compiled=True),
    "btx-ff": Row("dense, feed-forward weights train", trainable="feed_forward"),
    "btx-moe": Row(f"{EXPERTS} experts, Top-{K}", model="moe"),
    "floor": Row(f"btx, dense with the active FLOPs of {EXPERTS} experts Top-{K}", model="floor"),
    "small": Row("btx, a small dense model", model="small"),
    "transformers": Row("plain loop, no document mask", "transformers"),
    "transformers-moe": Row(f"plain loop, {EXPERTS} experts Top-{K}, grouped_mm", "transformers", model="moe"),
}
RATIOS = {  # (row, compared with): what is aimed at on one H100 at the shape of Llama-3.2-1B
    ("btx", "transformers-compile"): 1.15,
    ("btx", "transformers"): None,
    ("btx-ff", "transformers-compile"): 1.3,
    ("btx-moe", "transformers-moe"): 6.5,
    ("btx-moe", "floor"): 0.75,
    ("small", "small" + BEFORE): 2.0,
}
WARM_UP, LEAST_BLOCKS = 2, 3
BLOCK_S = 0.5
"""A timed block has as many steps as fit: the device is waited for once a block, not once a step."""
ROW_LIMIT_S = 150.0
ENOUGH_S = 20.0
"""Timed seconds of a row after which LEAST_BLOCKS blocks are enough."""


def shape_of(row: Row, shape: Shape, device: str, checkpointed: Sequence[str]) -> Shape:
    """The row's model at a shape of the line-up."""
    if row.model == "small":
        return SMALL[device]
    shape = replace(shape, checkpointing=row.model in checkpointed)
    if row.model == "moe":
        return replace(shape, experts=EXPERTS, k=K)
    return replace(shape, ff=K * shape.ff) if row.model == "floor" else shape


class Worker:
    """A candidate's process."""

    def __init__(self, name: str, order: Order, source: Path) -> None:
        self.name, self.order, self.source = name, order, source
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "train_candidate.py"), json.dumps(asdict(order))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        self.facts: dict[str, Any] = {}
        self.blocks: list[tuple[int, float]] = []
        """Timed steps and their seconds."""
        self.block_steps = 1
        self.failed = False

    def ask(self, deadline: float, do: str, **values: Any) -> dict[str, Any]:
        """The answer to a request. A process that has none by the deadline is ended; what failed once is not asked."""
        if self.failed:
            return {}
        left = max(1.0, deadline - time.monotonic())
        timer = threading.Timer(left, self.process.kill)
        timer.start()
        try:
            print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        answer = json.loads(line) if line else {"error": f"ended in {do}, or took longer than {left:.0f} s"}
        if "error" in answer:
            self.failed = True
            self.facts |= answer
        return dict(answer)

    def prepare(self, deadline: float) -> None:
        """Build, and warm up: first steps compile, allocate and record graphs."""
        self.facts |= self.ask(deadline, "build")
        times: list[float] = []
        while not self.failed and (len(times) < WARM_UP or (len(times) < 2 * WARM_UP and times[-1] < 1.0)):
            times.append(self.ask(deadline, "steps", count=1).get("wall_s", 0.0))
        if not self.failed:
            self.facts["warm_up"] = {"steps": len(times), "wall_s": round(sum(times), 2)}
            self.block_steps = max(1, min(50, int(BLOCK_S / max(times[-1], 1e-4))))
            self.facts |= self.ask(deadline, "peak")  # in case the time is up before the end

    def block(self, deadline: float) -> None:
        """Time one block of steps."""
        if (answer := self.ask(deadline, "steps", count=self.block_steps)) and not self.failed:
            self.blocks.append((self.block_steps, answer["seconds"]))

    def enough(self, repeat: int) -> bool:
        """Whether there is nothing more to time."""
        timed_s = sum(seconds for _, seconds in self.blocks)
        return self.failed or len(self.blocks) >= (repeat if timed_s < ENOUGH_S else LEAST_BLOCKS)

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def row(self) -> dict[str, Any]:
        """What was measured so far."""
        order, facts = self.order, dict(self.facts)
        row = {"name": self.name, "device": order.device, "machine": facts.pop("machine", None),
               "trainer": order.trainer, "trainable": order.trainable, "clock": order.clock, "compiled": order.compiled,
               "precision": order.precision, "settings": order.settings, **asdict(order.shape)}  # fmt: skip
        if self.blocks:
            step_s = statistics.median(seconds / steps for steps, seconds in self.blocks)
            speed, peak = (
                order.shape.step_tokens / step_s,
                peak_flops(str(row["machine"]), bfloat16=True),
            )
            warm_up = facts["warm_up"]
            row |= {
                "step_s": round(step_s, 5), "blocks": len(self.blocks), "block_steps": self.block_steps,
                "tokens_per_s": round(speed, 1),
                "mfu": None if peak is None else round(speed * facts["flops_per_token"] / peak, 4),
                "first_steps_s": round(max(0.0, warm_up["wall_s"] - warm_up["steps"] * step_s), 2),
            }  # fmt: skip
        return row | facts


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from the others of the file."""
    names = ("name", "machine", "hidden", "layers", "sequence", "document", "step_tokens", "micro_batch_tokens",
             "checkpointing", "threads", "clock")  # fmt: skip
    return (*(row.get(name) for name in names), json.dumps(row.get("settings")))


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one run, each with its speed over that of those it is compared with."""
    speed = {row["name"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    pairs = dict.fromkeys([*RATIOS, *((name, name + BEFORE) for name in speed)])
    found: list[dict[str, Any]] = []
    for row in rows:
        ratios = {other: round(speed[row["name"]] / speed[other], 3)
                  for name, other in pairs if name == row["name"] and name in speed and other in speed}  # fmt: skip
        found.append(row | ({"ratios": ratios} if ratios else {}))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a row, and what its speed is as a multiple of others'."""
    lines = ["| | tokens/s | MFU | peak GB | first steps s | ratios |", "|---|---|---|---|---|---|"]
    for row in with_ratios(rows):
        name = row["name"].removesuffix(BEFORE)
        text = f"{row['name']}: {ROWS[name].what}, {row['layers']} layers" + ", checkpointed" * row["checkpointing"]
        if "tokens_per_s" not in row:
            lines.append(f"| {text} | {row.get('error', 'not timed')} | | | | |")
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        ratios = ", ".join(f"{value:.2f} x {other}{goal(row, other)}" for other, value in row.get("ratios", {}).items())
        cells = (f"{row['tokens_per_s']:,.0f}", mfu, f"{row.get('peak_gb', 0.0):.3g}", row["first_steps_s"], ratios)
        lines.append(f"| {text} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def goal(row: dict[str, Any], other: str) -> str:
    """What a ratio is aimed at, where that was said for this machine and shape."""
    aim = RATIOS.get((row["name"], other))
    at_shape = "H100" in str(row["machine"]) and (
        row["hidden"] == SHAPES["llama-3.2-1b"].hidden or row["name"] == "small"
    )
    return f" (goal {aim})" if aim and at_shape else ""


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Put this run's rows into the file, in place of those of the same candidates."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else []
    again = {key(row) for row in rows}
    merged = [row for row in kept if key(row) not in again] + with_ratios(rows)
    beside = path.with_suffix(".part")
    beside.write_text("[\n" + ",\n".join(map(json.dumps, merged)) + "\n]\n", "utf-8")
    beside.replace(path)


def plan(arguments: argparse.Namespace) -> Iterator[tuple[str, Order, Path]]:
    """Name, order and source tree of every candidate."""
    shape = SHAPES[arguments.shape]
    changes = {"layers": arguments.layers, "micro_batch_tokens": arguments.micro_batch_tokens}
    shape = replace(shape, **{name: value for name, value in changes.items() if value})
    for name in arguments.rows:
        row = ROWS[name]
        order = Order(
            row.trainer, shape_of(row, shape, arguments.device, arguments.checkpointed), arguments.device,
            row.trainable, row.compiled, arguments.settings if row.trainer == "btx" else {}, arguments.threads,
            arguments.clock,
        )  # fmt: skip
        yield name, order, HERE.parent / "src"
        if arguments.baseline and row.trainer == "btx":
            yield name + BEFORE, replace(order, settings={}), arguments.baseline


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all candidates that the minutes allow; the file and the screen get each row as it is done."""
    started = time.monotonic()
    end = started + 60 * arguments.minutes
    planned, rows = list(plan(arguments)), list[dict[str, Any]]()
    size = 1 if arguments.alone else len(planned)
    groups = [planned[i : i + size] for i in range(0, len(planned), size)]
    with ExitStack() as stack:

        def start(number: int) -> list[Worker]:
            workers = [Worker(*candidate) for candidate in groups[number]] if number < len(groups) else []
            for worker in workers:
                stack.callback(worker.end)
            return workers

        following = start(0)
        for number in range(len(groups)):
            workers, following = following, start(number + 1)  # it imports while these are measured
            limit = min(end, time.monotonic() + (ROW_LIMIT_S if size == 1 else float("inf")))
            for worker in workers:
                if time.monotonic() > end:
                    worker.facts["error"], worker.failed = "left out: the minutes were used up", True
                worker.prepare(limit)
                print(f"{worker.name}: {worker.facts.get('error') or 'warmed up'}", file=sys.stderr, flush=True)
            while not all(worker.enough(arguments.repeat) for worker in workers) and time.monotonic() < limit:
                for worker in workers:
                    if not worker.enough(arguments.repeat):
                        worker.block(limit)
                write(rows + [worker.row() for worker in workers], arguments.output)
            for worker in workers:
                worker.facts |= worker.ask(limit, "peak")
                worker.end()
                rows.append(worker.row() | about(arguments))
                print(table(rows).splitlines()[-1], flush=True)
            write(rows, arguments.output)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return rows


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """When and how a row was measured."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    given = [word for word in sys.argv[1:] if word != str(arguments.baseline)]
    return {"command": " ".join(["python", "benchmarks/train.py", *given]), "commit": commit or None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip


def setting(text: str) -> dict[str, Any]:
    """key=value,key=value, the values as in YAML."""
    import yaml

    return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in text.split(",") if pair)}


def names(text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between them, each of them known."""
    chosen = [name for name in text.split(",") if name]
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return chosen


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: llama-3.2-1b on a GPU, hidden-256 on a CPU")
    parser.add_argument("--layers", type=int, help="of the dense and the MoE models; default: the shape's")
    parser.add_argument("--micro-batch-tokens", type=int, help="for all trainers; default: the shape's")
    parser.add_argument("--checkpointed", type=lambda text: names(text, ["dense", "moe", "floor"]),
                        help="with gradient checkpointing; default: moe,floor on a GPU, none on a CPU")  # fmt: skip
    parser.add_argument("--rows", type=lambda text: names(text, list(ROWS)), default=list(ROWS),
                        help=f"default: all, {','.join(ROWS)}")  # fmt: skip
    parser.add_argument("--settings", type=setting, default={}, help="training fields of btx's rows: compile=true,...")
    parser.add_argument("--baseline", type=Path, help="src folder of another btx, timed too")
    parser.add_argument("--alone", action="store_true", help="one candidate after the other, as always on a GPU")
    parser.add_argument("--repeat", type=int, default=5, help="timed blocks of each row")
    parser.add_argument("--minutes", type=float, default=15.0, help="what is not measured by then is left out")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the process's processor seconds")
    parser.add_argument("--output", type=Path, default=HERE / "train.json")
    arguments = parser.parse_args()
    if arguments.baseline and not (arguments.baseline / "btx" / "__init__.py").is_file():
        parser.error(f"--baseline {arguments.baseline}: there is no btx in it; give the src folder of a source tree")
    if arguments.clock == "cpu" and arguments.device == "cuda":
        parser.error("--clock cpu: a GPU's work is not in processor seconds")
    if arguments.device is None:
        arguments.device = "cuda" if has_gpu() else "cpu"
    arguments.alone |= arguments.device == "cuda"
    if arguments.shape is None:
        arguments.shape = "llama-3.2-1b" if arguments.device == "cuda" else "hidden-256"
    if arguments.checkpointed is None:
        arguments.checkpointed = ["moe", "floor"] if arguments.device == "cuda" else []
    return arguments


def has_gpu() -> bool:
    """Whether torch sees one; asked in another process, for this one holds nothing on it."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def main() -> None:
    """Measure and write."""
    rows = measure(parse())
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
