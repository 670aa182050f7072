"""`apt train --nproc N`: N processes of this machine that train together, started by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

SECONDS_TO_SAVE = "600"
"""How long the processes have to finish their step and save, once a signal has asked them to."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `apt` with `arguments` in so many processes, and wait for them; returns the exit code.

    What a process has to say it says itself. Said here is what no process can say: that one was killed.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    # Without a name server torch warns, in every process, that it cannot look up the name of this machine.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # this process has nothing else to log
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="apt",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else it leaves a folder of its own at each start
    )
    try:
        elastic_launch(config, sys.executable)("-m", "apt", *arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        # Where one has failed, the launcher has ended the others with this signal.
        codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
        rank, code = min(codes.items(), key=lambda item: (item[1] != -signal.SIGKILL, item[1] >= 0, item[0]))
        if code >= 0:
            return code
        fact = f"process {rank} of {processes} was killed by {signal.Signals(-code).name}"
        if rank == 0:  # which would have said how the run stands
            fact = f"error: {fact}\n  fix: go on from what was saved before with: apt train --resume"
        print(fact, file=sys.stderr)
        return 128 - code
    return 0
