"""From nothing to film recommendations on MovieLens-100K: every step, then what it was worth.

Downloads the data (2 MB), tokenises the films, trains a small teacher, distils the student, exports
it, loads it with sidmlp_kernels and recommends. Each step prints the command that does it alone.
Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import positive
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from sidmlp.data import Interactions

# Sized for two minutes on two cores. Matrices this small gain nothing from a second thread, and
# lose a lot when something else runs on its core. People rate many films in one sitting, in no
# meaningful order, so each history predicts several following films: more is learnt per second.
TOKENIZE = "--codes 64,64 --max-items 10"
TEACHER = (
    "--dim 64 --layers 2 --heads 2 --head-dim 32 --ffn 256 --targets-per-history 8 "
    "--threads 1 --dropout 0 --epochs 4 --examples-per-epoch 12000 --batch-size 64 --lr 2e-3 "
    "--warmup 50"
)
STUDENT = (
    "--hidden 256 --dropout 0.1 --epochs 4 --max-examples 20000 --batch-size 256 --lr 2e-3 "
    "--threads 1 --warmup 50 --alpha 0.9 --validate-every 2"
)
METHODS = {
    "popularity": "popularity",
    "teacher": "teacher (Transformer, beam search)",
    "reference": "student, PyTorch reference",
    "kernel": "student, sidmlp_kernels",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="where results go")
    add(
        "--cache",
        type=Path,
        default=Path("data/cache"),
        metavar="DIR",
        help="where the MovieLens download is kept",
    )
    add(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="a recbole-1.2.1 wheel that is already there, to work offline (default: download)",
    )
    add("--users", type=positive, default=3, help="people whose recommendations are printed")
    add("--batch", type=positive, default=32, help="requests per call when timing")
    add(
        "--compile-limit",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="give up on torch.compile of the reference after that long",
    )


def run(options: argparse.Namespace) -> None:
    """Runs every step and prints the results."""
    import sidmlp_kernels
    from sidmlp.data.files import write_json

    from .artifacts import load_data

    begin = time.perf_counter()
    directory = RunDirectory(options.run)
    source = ["--movielens", "--cache", str(options.cache)]
    if options.wheel is not None:
        source += ["--wheel", str(options.wheel)]
    steps = {
        "data": source,
        "tokenize": TOKENIZE.split(),
        "train-teacher": [*TEACHER.split(), "--device", "cpu", "--restart"],
        "distill": [*STUDENT.split(), "--device", "cpu", "--restart"],
        "export": [],
    }
    for command, arguments in steps.items():
        _step([command, "--run", str(options.run), *arguments])

    # The table compares like with like: everything in it runs on the CPU.
    model = sidmlp_kernels.load(directory.checkpoint, device="cpu")
    print(f"\n# loaded {directory.checkpoint} on backend {model.backend!r}")
    _print_people(model, load_data(directory), options.users)
    quality = _print_quality(directory)
    speed = _print_speed(directory, model, options.batch, options.compile_limit)
    write_json(directory.path / "demo.json", {"quality": quality, "speed": speed})
    program, checkpoint = _from_here(Path(sys.executable)), _from_here(directory.checkpoint)
    print(
        f"\nDone in {time.perf_counter() - begin:.0f} s. Now your own list:\n"
        f'  {program} -m sidmlp recommend {checkpoint} "Toy Story" "Lion King" "Aladdin (1992)"'
    )


def _from_here(path: Path) -> str:
    """``path`` for a shell in the working directory: relative to it if inside, and quoted."""
    whole = Path.cwd() / path  # links stay: the interpreter of a virtual environment is one
    inside = whole.is_relative_to(Path.cwd())
    return shlex.quote(str(whole.relative_to(Path.cwd()) if inside else whole))


def _step(arguments: list[str]) -> None:
    from . import build_parser

    print(f"\n$ sidmlp {shlex.join(arguments)}", flush=True)
    begin = time.perf_counter()
    options = build_parser(arguments[0]).parse_args(arguments)
    options.run_command(options)
    print(f"  {time.perf_counter() - begin:.1f} s", flush=True)


def _print_people(model: Any, data: Interactions, count: int) -> None:
    """Recent films and recommendations of a few test users; a star marks what came next."""
    from sidmlp.data import leave_last_out
    from sidmlp.evaluate import Questions

    questions = Questions.of(leave_last_out(data).test).sample(count, seed=7)
    histories = [data.item_ids[items] for items in questions.exclude]
    found = model.decode(model.batch(histories), k=5, exclude=histories)
    title = {int(number): data.title(item) for item, number in enumerate(data.item_ids)}
    for row, history in enumerate(histories):
        user = int(questions.examples.users[row])
        print(f"\nUser {user} saw last: " + "; ".join(title[int(i)] for i in history[-4:]))
        print("  then: " + title[int(data.item_ids[questions.targets[row]])])
        for rank in range(int(found.counts[row])):
            item, score = int(found.items[row, rank]), float(found.scores[row, rank])
            hit = "  <-" if item == int(data.item_ids[questions.targets[row]]) else ""
            print(f"  {rank + 1}. {title[item]}  ({score:.2f}){hit}")


def _print_quality(directory: RunDirectory) -> dict[str, Any]:
    from sidmlp.evaluate import format_table

    from .evaluate import measure

    found = measure(directory, tuple(METHODS), beams=50)
    rows = [
        (METHODS[name], f"{values['recall_10']:.4f}", f"{values['ndcg_10']:.4f}")
        for name, values in found.items()
    ]
    print("\n# The film each of 943 people chose next, among ten recommendations")
    print(format_table(("", "Recall@10", "NDCG@10"), rows))
    return found


def _print_speed(
    directory: RunDirectory, model: Any, batch: int, compile_limit: int
) -> dict[str, Any]:
    import torch

    from sidmlp.evaluate import format_table

    from .timing import NUM_BEAMS, K, Parity, Problem, compiled_microseconds, microseconds

    torch.set_num_threads(1)
    print(
        f"\n# Timing the student; torch.compile of the reference takes up to {compile_limit} s",
        flush=True,
    )
    problem = Problem.of(directory, batch)
    arguments = (problem.states, problem.mask)
    found = model.decode_states(*arguments, k=K, num_beams=NUM_BEAMS)
    parity = Parity.of(problem.reference(exact_ties=True)(), found.items, found.scores)
    eager = microseconds(problem.reference(exact_ties=False), batch)
    compiled, note = compiled_microseconds(directory, batch, compile_limit)
    kernel = microseconds(lambda: model.decode_states(*arguments, k=K, num_beams=NUM_BEAMS), batch)

    def row(name: str, taken: float | None, note: str = "") -> tuple[str, str, str, str]:
        if taken is None:
            return name, "-", "-", note
        return name, f"{taken:.1f}", f"{eager / taken:.1f}x", note

    rows = [
        row("PyTorch reference, eager", eager),
        row("PyTorch reference, torch.compile", compiled, note),
        row(f"sidmlp_kernels, {model.backend}", kernel),
    ]
    print(
        f"\n# Student decode, encoder states to {K} items: {NUM_BEAMS} beams, "
        f"{batch} requests a call, one thread each"
    )
    print(format_table(("", "us per request", "speed", ""), rows))
    print(
        f"Parity: {parity.agreeing:.2%} of the reference's items are in the kernel's answer; "
        f"largest score difference {parity.largest_difference:.1e}"
    )
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "eager_us": eager,
        "compiled_us": compiled,
        "compiled_note": note,
        "kernel_us": kernel,
        "agreeing": parity.agreeing,
        "largest_score_difference": parity.largest_difference,
    }
