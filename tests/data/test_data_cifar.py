import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvae.data import cifar, load
from bvae.errors import UserError

NUM = 20  # images a batch in the files made here
REAL = os.environ.get("BVAE_TEST_CIFAR10")


@pytest.fixture(autouse=True)
def small_batches(request, monkeypatch):
    if "real" not in request.node.name:
        monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", NUM)


def records(seed):
    """Labels [NUM] and planar pixels [NUM, 3072] of one batch."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 10, NUM, dtype=np.uint8), rng.integers(0, 256, (NUM, 3072), dtype=np.uint8)


def binary(seed):
    labels, pixels = records(seed)
    return np.concatenate([labels[:, None], pixels], 1).tobytes()


def python2(seed):
    """A batch as Python 2 pickled it (protocol 2, byte strings), which is how the official files were made."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    labels, pixels = records(seed)
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    array += (
        b"(" + integer(1) + integer(NUM) + integer(3072) + b"\x86" + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    )
    items = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"data") + array
    items += text(b"labels") + b"](" + b"".join(integer(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + items + b"u."


def python3(seed, protocol=2, order="C"):
    labels, pixels = records(seed)
    return pickle.dumps({b"data": np.asarray(pixels, order=order), b"labels": labels.tolist()}, protocol)


def python3_text_keys(seed):
    return pickle.dumps({"data": records(seed)[1]}, 4)


FORMS = {
    "binary": (binary, ".bin", "cifar-10-batches-bin"),
    "python 2": (python2, "", "cifar-10-batches-py"),
    "python 3": (python3, "", "cifar-10-batches-py"),
    "python 3, protocol 4, text keys": (python3_text_keys, "", "cifar-10-batches-py"),
    "python 3, Fortran order": (lambda seed: python3(seed, order="F"), "", "cifar-10-batches-py"),
}


def batch_files(form):
    write, suffix, folder = FORMS[form]
    return folder, {f"{name}{suffix}": write(seed) for seed, name in enumerate(cifar.BATCHES)}


def write_folder(parent, form):
    name, files = batch_files(form)
    (parent / name).mkdir()
    for file, data in files.items():
        (parent / name / file).write_bytes(data)
    (parent / name / "readme.html").write_text("hello")
    return parent / name


def write_tar(path, members):
    """members: (TarInfo or name, bytes)."""
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def expected_images():
    """Pixel by pixel from the format's description: 1024 red, 1024 green, 1024 blue, each row by row."""
    batches = []
    for seed in range(6):
        images = np.empty((NUM, 32, 32, 3), np.uint8)
        for n, row in enumerate(records(seed)[1]):
            for channel in range(3):
                images[n, :, :, channel] = row[channel * 1024 : (channel + 1) * 1024].reshape(32, 32)
        batches.append(images)
    return np.concatenate(batches[:5]), batches[5]


def check(data):
    train, test = expected_images()
    assert data.name == "cifar10" and data.factors is None
    assert np.array_equal(data.train, train) and np.array_equal(data.test, test)
    for images in (data.train, data.test):
        assert images.flags.c_contiguous and images.flags.writeable


def refused(path, *words, **options):
    with pytest.raises(UserError) as caught:
        load(path, **{"side": 32, "channels": 3} | options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in (path, *words):
        assert str(word) in text


def test_the_pickles_made_here_are_ones_that_pickle_itself_reads():
    batch = pickle.loads(python2(0), encoding="bytes")
    assert np.array_equal(batch[b"data"], records(0)[1]) and batch[b"labels"] == records(0)[0].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_folders(tmp_path, form):
    folder = write_folder(tmp_path, form)
    check(load(folder, side=32, channels=3))
    check(load(tmp_path, side=32, channels=3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "./"])
def test_archives_are_read_in_memory(tmp_path, form, prefix):
    folder, files = batch_files(form)
    members = [(f"{prefix}{folder}/{name}", data) for name, data in files.items()]
    write_tar(tmp_path / "cifar-10.tar.gz", [(f"{prefix}{folder}/readme.html", b"hello"), *members[::-1]])
    check(load(tmp_path / "cifar-10.tar.gz", side=32, channels=3))
    assert os.listdir(tmp_path) == ["cifar-10.tar.gz"]


def test_one_content_has_one_digest(tmp_path):
    digests = set()
    for form in FORMS:
        parent = tmp_path / form
        parent.mkdir()
        digests.add(load(write_folder(parent, form), side=32, channels=3).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("form", ["binary", "python 2"])
def test_another_side_or_channels(tmp_path, form):
    folder = write_folder(tmp_path, form)
    refused(folder, "32x32", "--side 32", side=64)
    refused(folder, "3 channel", "--channels 3", channels=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_or_truncated_batch(tmp_path, form):
    folder = write_folder(tmp_path, form)
    victim = sorted(folder.glob("data_batch_3*"))[0]
    whole = victim.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole[: 3073 * (NUM // 2)]):
        victim.write_bytes(damaged)
        refused(folder, victim.name)
    victim.unlink()
    refused(folder, victim.name, "missing")
    victim.mkdir()
    refused(folder, victim.name)


def test_binary_records_that_are_not_cifar10(tmp_path):
    folder = write_folder(tmp_path, "binary")
    (folder / "test_batch.bin").write_bytes(bytes([10]) + bytes(NUM * 3073 - 1))
    refused(folder, "test_batch.bin", "label")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([1, 2], ["no array"]),
        ({b"labels": [1]}, ["no array"]),
        ({b"data": [1, 2]}, ["no array"]),
        ({b"data": np.zeros((NUM, 3072), np.float32)}, ["f4", "uint8"]),
        ({b"data": np.zeros((NUM, 3071), np.uint8)}, ["3071"]),
        ({b"data": np.zeros((NUM - 1, 3072), np.uint8)}, [f"({NUM - 1}, 3072)"]),
        ({b"data": np.zeros((NUM, 3072), object)}, ["O8"]),
    ],
)
def test_pickles_of_something_else(tmp_path, batch, words):
    folder = write_folder(tmp_path, "python 3")
    (folder / "data_batch_2").write_bytes(pickle.dumps(batch, 2))
    refused(folder, "data_batch_2", *words)


def test_an_array_whose_bytes_do_not_fill_its_shape(tmp_path):
    folder = write_folder(tmp_path, "python 2")
    lying = python2(0).replace(struct.pack("<i", 3072), struct.pack("<i", 3073), 1)
    (folder / "data_batch_1").write_bytes(lying)
    refused(folder, "data_batch_1", "3073")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, protocol):
    folder = write_folder(tmp_path, "python 3")
    sprung = tmp_path / "sprung"
    attacks = [
        Calls(os.mkdir, str(sprung)),
        Calls(eval, f"__import__('os').mkdir({str(sprung)!r})"),
        Calls(getattr, Calls(__import__, "os"), "mkdir"),
        Calls(np.load, str(sprung)),
        Calls(np.array, [1]),
        np.float64(1),
    ]
    for attack in attacks:
        for batch in (attack, {b"data": attack}, {b"data": records(0)[1], b"extra": [attack]}):
            data = pickle.dumps(batch, protocol)
            (folder / "data_batch_1").write_bytes(data)
            refused(folder, "data_batch_1", "asks for")
            write_tar(tmp_path / "a.tar.gz", [("cifar-10-batches-py/data_batch_1", data)])
            refused(tmp_path / "a.tar.gz", "data_batch_1", "asks for")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(S'touch sprung'\ntR.",
        b"(S'touch sprung'\nios\nsystem\n.",
        b"cnumpy\nndarray\n(tR.",  # the names that are known lead to no NumPy code
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01tb.",
        b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        b"\x82\x01.",
        b"Pname\n.",
    ],
)
def test_hand_made_attacks(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path, "python 2")
    (folder / "data_batch_1").write_bytes(attack)
    refused(folder, "data_batch_1", "not a readable")
    assert not (tmp_path / "sprung").exists()


def test_archives_without_all_batches(tmp_path):
    folder, files = batch_files("binary")
    path = tmp_path / "a.tar.gz"
    refused(write_tar(path, []), "no images")
    refused(write_tar(path, [("other.txt", b"hello")]), "no images")
    members = [(f"{folder}/{name}", data) for name, data in files.items()]
    refused(write_tar(path, members[1:]), "data_batch_1 missing")
    refused(write_tar(path, [*members, members[0]]), "twice")
    cut = [*members[:-1], (members[-1][0], members[-1][1][:-3073])]
    refused(write_tar(path, cut), "test_batch.bin", "truncated")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_not_followed(tmp_path, kind):
    folder, files = batch_files("binary")
    (tmp_path / "outside").write_bytes(files.pop("data_batch_1.bin"))
    odd = tarfile.TarInfo(f"{folder}/data_batch_1.bin")
    odd.type, odd.linkname = kind, str(tmp_path / "outside")
    members = [(odd, b""), *((f"{folder}/{name}", data) for name, data in files.items())]
    refused(write_tar(tmp_path / "a.tar.gz", members), "data_batch_1 missing")


def test_members_that_point_elsewhere_write_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    folder, files = batch_files("binary")
    members = [(f"../../{folder}/{name}", data) for name, data in files.items()]
    members += [("../escaped", b"x"), (str(tmp_path / "absolute"), b"x")]
    check(load(write_tar(tmp_path / "in" / "a.tgz", members), side=32, channels=3))
    assert sorted(os.listdir(tmp_path)) == ["in"] and os.listdir(tmp_path / "in") == ["a.tgz"]


def test_a_member_that_claims_gigabytes_is_not_read(tmp_path):
    header = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    header.size = 2**40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    refused(tmp_path / "a.tar", "data_batch_1", "too many")


def test_damaged_archives(tmp_path):
    folder, files = batch_files("binary")
    whole = write_tar(tmp_path / "a.tar.gz", [(f"{folder}/{n}", d) for n, d in files.items()]).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damaged in (b"", b"junk", whole[:5], whole[: len(whole) // 2], bytes(flipped), gzip.compress(b"hello" * 200)):
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        refused(tmp_path / "a.tar.gz")


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """A folder and an archive of the python version, to be damaged."""
    folder = tmp_path_factory.mktemp("victims")
    write_folder(folder, "python 2")
    _, files = batch_files("python 2")
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder, files["data_batch_1"], plain.getvalue()


CHANGES = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6)


def mutate(original, changes, kept, places):
    data = bytearray(original)
    for position, value in changes:
        data[places[position % len(places)]] = value
    return bytes(data[: int(kept * len(data))])


def loads_or_refuses(path):
    try:
        data = load(path, side=32, channels=3)
        assert data.train.shape == (5 * NUM, 32, 32, 3) and data.test.shape == (NUM, 32, 32, 3)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=CHANGES, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_mutated_pickles_load_or_are_refused(victims, changes, kept):
    folder, batch, _ = victims
    # Where the opcodes are: before and after the block of pixels.
    places = [*range(300), *range(len(batch) - 150, len(batch))]
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(mutate(batch, changes, kept, places))
    loads_or_refuses(folder)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=CHANGES, kept=st.one_of(st.just(1.0), st.floats(0, 1)), compressed=st.booleans())
def test_mutated_archives_load_or_are_refused(victims, changes, kept, compressed):
    folder, _, plain = victims
    path = folder / "mutated.tar.gz"
    if compressed:
        data = gzip.compress(plain, 1)
        path.write_bytes(mutate(data, changes, kept, range(len(data))))
    else:
        starts = [i for i in range(0, len(plain), 512) if plain[i + 257 : i + 262] == b"ustar"]
        places = [start + offset for start in starts for offset in range(512)]
        path.write_bytes(mutate(plain, changes, kept, places))
    loads_or_refuses(path)


@pytest.mark.skipif(not REAL, reason="BVAE_TEST_CIFAR10 does not name a folder with CIFAR-10")
def test_real_cifar10():
    data = load(Path(REAL), side=32, channels=3)
    assert data.train.shape == (50_000, 32, 32, 3) and data.test.shape == (10_000, 32, 32, 3)
    # The channel means everybody normalises with: 0.4914, 0.4822, 0.4465.
    assert np.allclose(data.train.mean((0, 1, 2)) / 255, [0.49140, 0.48216, 0.44653], atol=1e-5)
    # The red plane first, row by row: neighbours in the image are alike, and would not be under another layout.
    steps = [np.abs(np.diff(data.test.astype(int), axis=axis)).mean() for axis in (1, 2, 3)]
    assert max(steps) < 20
