"""`apt toy-lambda`: what the layers of a run have come to."""

import json
from pathlib import Path

from apt.api import DataError


def run(args):
    try:
        lines = (Path(args.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{args.run_dir} is no run: {error}", hint="name the folder of one") from error
    lambdas = {}
    for record in records:
        lambdas |= {name: value for name, value in record.items() if name.startswith("toy_lambda.")}
    for name, value in lambdas.items():
        print(f"{name}  {value:.3f}")
    return 0
