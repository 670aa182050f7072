"""Two processes of one run, in a network of their own where at one step all traffic stops: nothing is closed, nobody
answers, as where a machine loses its power or its cable.

    python silent_machine.py CONFIG      CONFIG is a profile as JSON; prints what each process ends with, as JSON
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
from typing import Any

CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 0x1
NOT_ALLOWED = 77
"""The exit code where this user may not make a network."""

SILENCE, STEP, PORT = 4, 7, 29500


def loopback(flags: int) -> None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))


class Cable:
    """Is pulled by process 0, once a step is done."""

    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == STEP and trainer.world.is_first:
            loopback(0)


def work(config: Any) -> dict[str, Any]:
    from apt.core import world
    from apt.core.errors import AptError
    from apt.training.trainer import Trainer

    world.SILENCE = SILENCE
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Cable())
    try:
        trainer.train()
    except AptError as error:
        return {"error": type(error).__name__, "message": error.message, "run": str(trainer.run_dir)}
    return {"error": None}


def main() -> int:
    config = sys.argv[1]
    if "RANK" in os.environ:
        print(json.dumps(work(json.loads(config))), flush=True)
        os._exit(0)
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(CLONE_NEWNET):
        return NOT_ALLOWED
    loopback(IFF_UP)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, config],
            env={**os.environ, **world, "RANK": str(rank), "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    print(json.dumps([json.loads(process.communicate()[0]) for process in processes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
