"""gemma2-fast bench: measurements beside the machine's limits and beside other engines."""

from __future__ import annotations

import argparse
from typing import Any

from gemma2_fast.bench import flat, generate, gpu, machine, ops, peers, report
from gemma2_fast.cli.options import Subparsers

MEASUREMENTS = (machine, ops, generate, flat, peers, gpu, report)


def add_parser(commands: Subparsers[Any]) -> None:
    parser = commands.add_parser("bench", help="measure this machine, the engine and its peers")
    measurements = parser.add_subparsers(title="measurements", metavar="WHAT", required=True)
    for module in MEASUREMENTS:
        text = module.__doc__ or ""
        measurement = measurements.add_parser(
            module.__name__.rpartition(".")[2],
            help=" ".join(text.split("\n\n")[0].split()),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(measurement)
        measurement.add_argument("--quiet", action="store_true", help="no notes about the choices made")
        measurement.add_argument("--traceback", action="store_true", help="show where an error came from")
        measurement.set_defaults(run=module.run)
