"""NVIDIA's Multi-Process Service for a study whose trainings share a GPU: a server of its own, which ends with it.

Without it the processes of one GPU take turns in time slices; with it their kernels run at the same time. The server's
control program runs as a child in the foreground, so that it dies with the study as the trainings do.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bvae.errors import UserError
from bvae.studies.jobs import Child, Place

CONTROL = "nvidia-cuda-mps-control"
START_SECONDS = 10.0
STOP_SECONDS = 5.0


@contextmanager
def mps(log: Path) -> Iterator[Mapping[str, str]]:
    """The environment by which children use a server of this study's own, as long as the block is open.

    Raises UserError where the control program is not there or does not start.
    """
    program = shutil.which(CONTROL)
    if program is None:
        raise UserError(f"--mps: {CONTROL} is not installed; it comes with the NVIDIA driver")
    with tempfile.TemporaryDirectory(prefix="bvae-mps-") as folder:  # a pipe's path may not be long
        environment = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        child = Child([program, "-f"], log, Place("mps", environment))
        try:
            end = time.monotonic() + START_SECONDS
            while not (Path(folder) / "control").exists():
                if child.poll() is not None or time.monotonic() > end:
                    raise UserError(f"--mps: {CONTROL} does not start: {child.reason()}")
                time.sleep(0.05)
            yield environment
        finally:
            subprocess.run(
                [program], input=b"quit\n", env={**os.environ, **environment}, capture_output=True, check=False
            )
            if not child.wait(STOP_SECONDS):
                child.stop(9)
                child.wait(5.0)
