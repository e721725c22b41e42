"""`python -m sidmlp_kernels doctor`: what is installed and what runs here."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m sidmlp_kernels",
        description="Fused kernels that decode semantic-ID recommenders.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="say what is installed, what was built and which backends run here",
        description=(
            "Prints versions, the paths of the compiled libraries, the processor's instruction "
            "sets, the GPUs, and for each backend whether it can decode a student of the published "
            "sizes, or why not. Paste the output into bug reports. The exit status is 1 when no "
            "backend can."
        ),
    )
    parser.parse_args(arguments)
    from . import doctor

    print(doctor.report())
    return 0 if doctor.healthy() else 1


if __name__ == "__main__":
    sys.exit(main())
