"""The command line: from item histories to recommendations, one command a step.

Every command is a module here with ``add_arguments`` and ``run``; only the chosen one is imported.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

COMMANDS = {
    "data": "get item histories: MovieLens-100K, Amazon Reviews, a table or arrays of your own",
    "tokenize": "give every item a short tuple of codes, its semantic ID",
    "train-teacher": "train the accurate but slow model (TIGER, a small Transformer)",
    "distill": "train the fast model to imitate the teacher",
    "sweep": "distil with many settings and choose by validation",
    "import-official": "take codes and models that the paper's authors published",
    "export": "write the fast model as a directory that sidmlp_kernels loads",
    "evaluate": "measure how often the held-out next item is recommended",
    "report": "curves and tables of a run, for people",
    "recommend": "print recommendations for a list of items",
    "demo": "all of the above on MovieLens-100K, in a few minutes on a CPU",
}

# What to install for a package that is missing; '.[train]' for the others.
EXTRAS = {
    "sidmlp_kernels": ".",
    "matplotlib": "'.[report]'",
    "tensorboard": "'.[report]'",
}

EPILOG = """\
A usual session, each command finding what the one before it left in the run directory:

  sidmlp data          --run runs/films --movielens
  sidmlp tokenize      --run runs/films
  sidmlp train-teacher --run runs/films
  sidmlp distill       --run runs/films
  sidmlp export        --run runs/films
  sidmlp evaluate      --run runs/films
  sidmlp recommend runs/films/student "Toy Story" "Aladdin"

`sidmlp COMMAND --help` explains a command and shows its defaults.
"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return super()._get_help_string(action)


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of the commands only ``command`` has its arguments filled in."""
    parser = argparse.ArgumentParser(
        prog="sidmlp",
        description="Recommend items by generating their semantic IDs: short tuples of codes.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=text, add_help=False)
            continue
        module = _module(name)
        sub = commands.add_parser(
            name, help=text, description=module.__doc__, formatter_class=HelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run_command=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 is success, 2 a mistake that one sentence on stderr explains."""
    arguments = sys.argv[1:] if argv is None else argv
    command = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(command if command in COMMANDS else None)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("faiss", "httpx", "torch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        options.run_command(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"sidmlp {command}: {_one_sentence(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        named = "" if error.filename is None else f": {error.filename}"
        print(f"sidmlp {command}: {error.strerror or error}{named}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError, by name: nothing here imports torch.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            f"sidmlp {command}: out of memory ({_one_sentence(error) or 'no more is to be had'}); "
            f"free some, or ask for less at a time (--batch-size, --batch, --beams, --users, where "
            f"the command has them; trainings with another --batch-size begin anew: --restart)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\nsidmlp {command}: stopped; run the same command again", file=sys.stderr)
        return 130
    return 0


def _module(name: str):  # type: ignore[no-untyped-def]  # a module with two known functions
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _one_sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        what = EXTRAS.get(package, "'.[train]'")
        return (
            f"the package {package} is not installed; "
            f"run `pip install --no-build-isolation -e {what}` in the repository"
        )
    return " ".join(str(error).split())
