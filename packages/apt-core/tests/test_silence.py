"""A machine that says nothing any more is noticed, although its connections stay open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import silent_machine
from distributed_workers import alone, assert_near, plain_config, store

from apt.core.runs import RunFolder


@pytest.mark.skipif(sys.platform != "linux", reason="networks of one's own are a thing of Linux")
@pytest.mark.parametrize(("parallel", "step"), [("ddp", 8), ("fsdp", 6)])
def test_a_machine_that_falls_silent_ends_the_run_with_a_checkpoint_that_resumes(
    tmp_path: Path, parallel: str, step: int
) -> None:
    config = plain_config(tmp_path, hardware={"device": "cpu", "parallel": parallel})
    done = subprocess.run(
        [sys.executable, silent_machine.__file__, json.dumps(config)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == silent_machine.NOT_ALLOWED:
        pytest.skip("this user may not make a network namespace")
    assert done.returncode == 0, done.stderr
    first, other = json.loads(done.stdout)
    assert [first["error"], other["error"]] == ["PeerLostError"] * 2
    lost = "another process of the run was killed, or is out of reach, in step 8"
    kept = f"the run is saved in {first['run']}" if step == 8 else "what was saved before is kept"
    assert first["message"] == f"{lost}; {kept}"
    assert other["message"] == f"{lost}; what was saved before is kept"
    assert store(first["run"]).latest() == step
    alone(f"{first['run']}/profile.yaml", resume=RunFolder(Path(first["run"])))
    assert_near(first["run"], alone(config)["run"])
