"""`apt consolidate`: the checkpoints that several processes have saved in shards, as those of a single process."""

from __future__ import annotations

import warnings
from argparse import Namespace

from apt.cli.screen import in_bytes
from apt.core.errors import AptWarning, CheckpointError
from apt.core.runs import find_run


def run_consolidate_command(args: Namespace) -> int:
    """Rewrite every checkpoint of the run `args.run_name` that is in shards."""
    run = find_run(args.run_name)

    from apt.checkpoint.manifest import SHARDED, folders_of, read_manifest
    from apt.checkpoint.store import CheckpointStore
    from apt.training.run_lock import only_trainer

    with only_trainer(run.path):
        store = CheckpointStore(run.checkpoints)
        store.keep_last = len(store.steps()) + 1
        done = 0
        for step, folder in sorted(folders_of(run.checkpoints).items()):
            try:
                if read_manifest(folder, step)["format"] != SHARDED:
                    continue
                checkpoint = store.load(step)
            except CheckpointError as error:
                warnings.warn(f"{error.message}; it is left as it is", AptWarning, stacklevel=2)
                continue
            path = store.save(checkpoint)
            done += 1
            print(f"{path}: {in_bytes(sum(file.stat().st_size for file in path.iterdir()))}, in one piece")
    if not done:
        print(f"Nothing to do: no checkpoint of {run.path} is in shards")
    return 0
