"""TensorBoard event files, written synchronously."""

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bvae.files import writing

HISTOGRAM_BUCKETS = 32


class EventFile:
    """A TensorBoard event file.

    `torch.utils.tensorboard.SummaryWriter` writes from a thread of its own: on a full disk that thread dies with a
    traceback on stderr. Its file names order by second, host and process, so a quick resume may sort before the file
    it continues, which turns the purge around.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Open a new event file in `folder`. Entries of earlier files there, from `purge_step` on, are void."""
        # Here because these take a third of a second, which a process that only reads metrics need not spend.
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._histogram = summary_pb2.HistogramProto
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stamps = [re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in folder.iterdir()]
            # TensorBoard reads the files of a folder in the order of their names.
            stamp = max([int(time.time()), *(int(match[1]) + 1 for match in stamps if match)])
            self._file = open(folder / f"events.out.tfevents.{stamp:010d}.bvae", "xb")  # noqa: SIM115 (closed by close)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=purge_step, session_log=start)
        self.flush()

    def _write(self, **fields: Any) -> None:
        with writing(self._folder):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def values(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers as scalars, lists of numbers as histograms of their finite elements; anything else is passed over."""
        found = []
        for tag, value in values.items():
            if isinstance(value, int | float):
                found.append(self._summary.Value(tag=tag, simple_value=value))
            elif isinstance(value, list):
                array = np.asarray(value, dtype=np.float64)
                array = array[np.isfinite(array)]
                if array.size:
                    found.append(self._summary.Value(tag=tag, histo=self._histogram_of(array)))
        self._write(step=step, summary=self._summary(value=found))

    def _histogram_of(self, array: np.ndarray) -> Any:
        counts, edges = np.histogram(array, HISTOGRAM_BUCKETS)
        return self._histogram(
            min=array.min(),
            max=array.max(),
            num=array.size,
            sum=array.sum(),
            sum_squares=(array**2).sum(),
            bucket_limit=edges[1:],
            bucket=counts,
        )

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        png = io.BytesIO()
        height, width, channels = array.shape
        Image.fromarray(array[:, :, 0] if channels == 1 else array).save(png, "png")
        image = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=tag, image=image)]))

    def flush(self) -> None:
        with writing(self._folder):
            self._file.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._file.close()
