import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch

from bvae.batches.mapped import MappedImages, locate
from bvae.batches.resident import ImageBatches, chunks
from bvae.batches.streamed import StreamedImageBatches, place
from bvae.errors import UserError

CPU = torch.device("cpu")
_host = pytest.importorskip("bvae._host", reason="the compiled extension is not there")


def write_images(path, count=60, side=5, channels=3):
    data = np.random.default_rng(count).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    np.save(path, data)
    return data


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "train.npy"
    write_images(path)
    return np.load(path, mmap_mode="r")


def streamed(stored, device=CPU, batch=7, seed=3, dtype=torch.float32, **kwargs):
    return StreamedImageBatches(MappedImages(stored, torch.device(device)), batch, seed, dtype, **kwargs)


def resident(stored, device=CPU, batch=7, seed=3, dtype=torch.float32, **kwargs):
    return ImageBatches(torch.from_numpy(np.array(stored)).to(device), batch, seed, dtype, **kwargs)


def assert_same(a, b):
    a, b = [(x.clone(), t.clone()) for x, t in a], [(x.clone(), t.clone()) for x, t in b]
    assert len(a) == len(b)
    for (x, target), (x2, target2) in zip(a, b, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(target, target2)


def reading_threads():
    return len(os.listdir("/proc/self/task"))


# ---- the batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_batches_are_those_of_resident_images(stored, device, dtype, hflip, threads):
    a = streamed(stored, device, dtype=dtype, hflip=hflip, threads=threads)
    b = resident(stored, device, dtype=dtype, hflip=hflip)
    for epoch in (0, 1, -1):
        assert_same(a.epoch(epoch), b.epoch(epoch))


@pytest.mark.parametrize("first", [0, 1, 7, 8])
def test_an_epoch_goes_on_from_its_middle(stored, device, first):
    assert_same(
        streamed(stored, device, hflip=True).epoch(2, first), resident(stored, device, hflip=True).epoch(2, first)
    )


def test_an_epoch_may_be_left_at_any_place(stored, device):
    a, b = streamed(stored, device), resident(stored, device)
    for taken in (1, 3, 0):
        assert_same(itertools.islice(a.epoch(5), taken), itertools.islice(b.epoch(5), taken))
    assert_same(a.epoch(1), b.epoch(1))


@pytest.mark.parametrize(("batch", "threads"), [(1, 2), (60, 4), (33, 8), (64, 1)])
def test_any_batch_and_number_of_threads(stored, batch, threads):
    assert_same(streamed(stored, batch=batch, threads=threads).epoch(0), resident(stored, batch=batch).epoch(0))


def test_many_batches_through_a_short_ring_with_a_slow_reader(tmp_path, device):
    write_images(tmp_path / "a.npy", 4000, 4)
    stored = np.load(tmp_path / "a.npy", mmap_mode="r")
    a = streamed(stored, device, batch=32, threads=4)
    for i, ((x, _), (y, _)) in enumerate(zip(a.epoch(0), resident(stored, device, batch=32).epoch(0), strict=True)):
        if i % 40 == 0:
            time.sleep(0.01)  # the threads come to a full ring
        assert torch.equal(x, y)


def test_grey_images_and_offsets_within_the_file(tmp_path):
    data = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4)
    np.save(tmp_path / "grey.npy", data)
    mapped = np.load(tmp_path / "grey.npy", mmap_mode="r")[1:, ..., None]
    assert_same(streamed(mapped, batch=2).epoch(0), resident(mapped, batch=2).epoch(0))


class Rows:
    """As bvae.data.arrays.Rows."""

    def __init__(self, base, index):
        self.base, self.index = base, index
        self.shape, self.nbytes = (len(index), *base.shape[1:]), len(index) * base[:1].nbytes

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        return self.base[self.index[key]]


def test_some_rows_of_a_file(stored, device):
    rows = Rows(stored, np.arange(60)[np.arange(60) % 7 != 2])
    chosen = np.array(stored)[rows.index]
    assert_same(streamed(rows, device).epoch(0), resident(chosen, device).epoch(0))
    mapped = MappedImages(rows, torch.device(device))
    assert torch.equal(mapped[3:20].read().cpu(), torch.from_numpy(chosen[3:20]))
    assert torch.equal(place(rows, CPU, "never"), torch.from_numpy(chosen))
    assert isinstance(place(rows, CPU, "always"), MappedImages)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_reads_its_own_part_of_every_batch(stored, device, rank):
    part = slice(2 * rank, 2 * rank + 2)
    own, whole = streamed(stored, device, batch=6, hflip=True, part=part), resident(stored, device, 6, hflip=True)
    assert_same(own.epoch(1), [(x[part], target[part]) for x, target in whole.epoch(1)])


# ---- what is streamed -----------------------------------------------------------------------------------------------


def test_only_whole_pieces_of_a_mapped_file_are_located(stored, tmp_path):
    path, offset = locate(stored)
    assert path == str(tmp_path / "train.npy")
    assert np.fromfile(path, np.uint8, offset=offset).tobytes() == stored.tobytes()
    assert locate(stored[4:9]) == (path, offset + 4 * 75)
    assert locate(stored[::2]) is None
    assert locate(np.array(stored)) is None


def test_place_leaves_in_the_file_what_does_not_fit(stored, monkeypatch):
    assert torch.equal(place(stored, CPU, "auto"), torch.from_numpy(np.array(stored)))
    assert isinstance(place(stored, CPU, "always"), MappedImages)
    monkeypatch.setattr("bvae.batches.streamed.free_memory", lambda device: 2 * stored.nbytes)
    assert isinstance(place(stored, CPU, "auto"), torch.Tensor)
    monkeypatch.setattr("bvae.batches.streamed.free_memory", lambda device: 1.5 * stored.nbytes)
    assert isinstance(place(stored, CPU, "auto"), MappedImages)
    assert isinstance(place(stored, CPU, "never"), torch.Tensor)
    assert isinstance(place(np.array(stored), CPU, "auto"), torch.Tensor)
    with pytest.raises(UserError, match="in memory"):
        place(np.array(stored), CPU, "always")


def test_chunks_of_mapped_images_are_those_of_resident_ones(stored, device):
    mapped = MappedImages(stored, torch.device(device))
    here = torch.from_numpy(np.array(stored)).to(device)
    assert_same(chunks(mapped, 13), chunks(here, 13))
    assert_same(chunks(mapped[5:41], 9), chunks(here[5:41], 9))
    assert len(mapped[:1000]) == 60
    assert len(mapped[50:][:5]) == 5
    assert torch.equal(mapped[50:][2:4].read(), here[52:54])


# ---- files that fail ------------------------------------------------------------------------------------------------


def failing(action, batches, epoch=0):
    """The error that an epoch ends with after `action` has been done to the file."""
    action()
    with pytest.raises(UserError) as caught:
        for _ in batches.epoch(epoch):
            pass
    text = str(caught.value)
    assert "\n" not in text
    assert "train.npy" in text
    return text


def test_a_file_cut_short_while_in_use_ends_in_one_line(stored, tmp_path, device):
    batches = streamed(stored, device)
    path = tmp_path / "train.npy"
    assert "changed" in failing(lambda: os.truncate(path, 1000), batches)
    with pytest.raises(UserError, match=r"train.npy: .*short"):
        MappedImages(stored, CPU).read()


def test_a_file_cut_short_in_mid_epoch_gives_no_wrong_batch(tmp_path, device):
    data = write_images(tmp_path / "train.npy", 3000, 8)
    stored = np.load(tmp_path / "train.npy", mmap_mode="r")
    batches = streamed(stored, device, batch=10)
    good = resident(data, device, batch=10).epoch(0)
    with pytest.raises(UserError, match=r"train.npy: was (cut short|changed) while it was in use"):
        for i, ((x, _), (y, _)) in enumerate(zip(batches.epoch(0), good, strict=True)):
            assert torch.equal(x, y)
            if i == 20:
                os.truncate(tmp_path / "train.npy", 128)
    assert i >= 20


def test_a_file_written_to_in_mid_epoch_is_noticed_at_its_end(stored, tmp_path):
    batches = streamed(stored)
    with pytest.raises(UserError, match="changed while it was in use"):
        for i, _ in enumerate(batches.epoch(0)):
            if i == 1:
                os.utime(tmp_path / "train.npy")


def test_a_file_that_is_gone_or_too_short_is_refused_by_name(stored, tmp_path):
    images = MappedImages(stored, CPU)
    os.unlink(tmp_path / "train.npy")
    assert torch.equal(images.read(), torch.from_numpy(np.array(stored)))  # it stays open
    with pytest.raises(UserError, match=r"train.npy: cannot be opened \(No such file"):
        MappedImages(stored, CPU)
    (tmp_path / "train.npy").write_bytes(bytes(500))
    with pytest.raises(UserError, match=r"train.npy: is cut short"):
        MappedImages(stored, CPU)


def test_an_error_of_the_disk_is_surfaced(tmp_path, monkeypatch):
    # A directory opens for reading and fails in read(), as a disk would: with an errno.
    with pytest.raises(_host.ReadError, match=r"cannot be read at byte 0 \(Is a directory\)"):
        file = _host.RowFile(str(tmp_path), 0, 4, 1)
        file.read(np.zeros(1, np.int64), np.zeros(4, np.uint8).ctypes.data)


def test_rows_that_are_not_there_are_refused(stored):
    images = MappedImages(stored, CPU)
    buffer = np.zeros((2, 75), np.uint8)
    for row in (-1, 60):
        with pytest.raises(IndexError, match="out of range for 60 images"):
            images.file.read(np.array([0, row]), buffer.ctypes.data)
        with pytest.raises(IndexError, match="out of range for 60 images"):
            _host.RowStream(images.file, np.array([0, row]), 2, [buffer.ctypes.data], 1)
    with pytest.raises(TypeError):
        images.file.read(np.array([0, 1], np.int32), buffer.ctypes.data)
    with pytest.raises(ValueError, match="whole batches"):
        _host.RowStream(images.file, np.arange(3), 2, [buffer.ctypes.data], 1)
    with pytest.raises(TypeError):
        _host.RowStream(None, np.arange(2), 2, [buffer.ctypes.data], 1)


# ---- threads --------------------------------------------------------------------------------------------------------


def test_the_ring_bounds_what_is_read_ahead(stored):
    slots = np.zeros((2, 4 * 75), np.uint8)
    stream = _host.RowStream(MappedImages(stored, CPU).file, np.arange(60), 4, [s.ctypes.data for s in slots], 2)
    assert stream.next() == 0
    assert stream.next() == 1
    time.sleep(0.05)
    assert stream.next(wait=False) is None
    assert np.array_equal(slots.reshape(8, 75), stored[:8].reshape(8, 75)), "what was given must not be written over"
    stream.release()
    assert stream.next() == 0
    assert np.array_equal(slots[0].reshape(4, 75), stored[8:12].reshape(4, 75))
    assert np.array_equal(slots[1].reshape(4, 75), stored[4:8].reshape(4, 75))
    stream.release()
    stream.release()
    with pytest.raises(RuntimeError, match="nothing to release"):
        stream.release()
    stream.close()
    with pytest.raises(StopIteration):
        stream.next()


def test_waiting_lets_other_threads_run(stored):
    slots = np.zeros((1, 75), np.uint8)
    stream = _host.RowStream(MappedImages(stored, CPU).file, np.arange(2), 1, [slots.ctypes.data], 1)
    assert stream.next() == 0  # the ring is full: the next one cannot come before the release
    timer = threading.Timer(0.1, stream.release)
    timer.start()
    assert stream.next() == 0
    timer.join()


def test_several_threads_may_close_a_stream(stored):
    file = MappedImages(stored, CPU).file
    slots = np.zeros((2, 75), np.uint8)
    for _ in range(50):
        stream = _host.RowStream(file, np.arange(60), 1, [s.ctypes.data for s in slots], 8)
        closers = [threading.Thread(target=stream.close, daemon=True) for _ in range(4)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(timeout=30)
            assert not closer.is_alive(), "it waits for a thread that another has joined"
        with pytest.raises(StopIteration):
            stream.next()


def test_threads_that_cannot_start_are_an_error_of_reading(tmp_path):
    write_images(tmp_path / "train.npy", count=200)
    script = """
        import resource, sys
        import numpy as np
        from bvae import _host

        data = np.load(sys.argv[1], mmap_mode="r")
        file = _host.RowFile(sys.argv[1], data.offset, 75, 200)
        slot = np.zeros(75, np.uint8)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))  # no room for so many threads' stacks
        try:
            _host.RowStream(file, np.arange(200), 1, [slot.ctypes.data], 200)
        except _host.ReadError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "train.npy")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("reading threads cannot be started (")


def test_no_thread_is_left_behind(stored, tmp_path):
    before = reading_threads()
    batches = streamed(stored, batch=2, threads=5)
    list(itertools.islice(batches.epoch(0), 2))
    batches.begin(1)
    batches.close()
    batches.close()
    assert reading_threads() == before
    batches.begin(2)
    batches.fetch()
    del batches
    gc.collect()
    assert reading_threads() == before
    batches = streamed(stored, batch=2, threads=5)
    batches.begin(0)
    os.truncate(tmp_path / "train.npy", 200)
    with pytest.raises(UserError):
        for _ in range(30):
            batches.fetch()
    del batches
    gc.collect()
    assert reading_threads() == before


SCRIPT = """
    import sys, numpy as np, torch
    from bvae.batches.mapped import MappedImages
    from bvae.batches.streamed import StreamedImageBatches
    stored = np.load(sys.argv[1], mmap_mode="r")
    batches = StreamedImageBatches(MappedImages(stored, torch.device("cpu")), 2, 0, torch.float32, threads=3)
    batches.begin(0)
    batches.fetch()
"""


def run_script(tmp_path, more, **kwargs):
    code = textwrap.dedent(SCRIPT) + textwrap.dedent(more)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "train.npy")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_the_interpreter_exits_with_a_stream_under_way(stored, tmp_path):
    # Kept alive by a cycle and by the module: no destructor runs before the end.
    process = run_script(tmp_path, "keep = [batches]; keep.append(keep)\nimport builtins; builtins.keep = keep\n")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_ctrl_c_ends_a_wait(stored, tmp_path):
    more = """
        raw = batches._stream
        for _ in range(7):
            raw.next()
        print("waiting", flush=True)
        raw.next()  # the ring is full, and nobody releases
    """
    process = run_script(tmp_path, more)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (1, -signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors


def test_a_forked_child_can_drop_a_stream(stored, tmp_path):
    more = """
        import gc, os
        child = os.fork()
        if child == 0:
            del batches
            gc.collect()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        batches.fetch()
    """
    process = run_script(tmp_path, more)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
