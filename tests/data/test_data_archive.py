"""What is found in folders, zips and tars, in which order, and what of it cannot be read."""

import os
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib

import pytest
from pictures import encode, faces, picture, write_folder, write_tar, write_zip

from bvae.data import archive
from bvae.data.archive import open_source
from bvae.data.recipe import Rejected
from bvae.data.splits import make_plan
from bvae.errors import UserError

PNG = encode(picture())


def contents(source):
    """{name: bytes, or the reason why there are none}, in the order in which they are given out."""
    found = {}
    for numbers, items in source.chunks(lambda number: True):
        for number, item in zip(numbers, items, strict=True):
            assert source.items[number].name == item.name
            try:
                found[item.name] = item.read()
            except Rejected as error:
                found[item.name] = str(error)
    return found


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        contents(open_source(path))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in words:
        assert str(word) in text


def refuses(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


TREE = {
    "b/2.jpg": b"two",
    "a/1.PNG": b"one",
    "a-b/3.webp": b"three",
    "readme.txt": b"-",
    "a/.hidden.png": b"-",
    "__MACOSX/a/._1.png": b"-",
    ".cache/4.png": b"-",
    ".DS_Store": b"-",
    "b/Thumbs.db": b"-",
    "naïve/ж.png": b"four",
}
IMAGES = {name: TREE[name] for name in ("a-b/3.webp", "a/1.PNG", "b/2.jpg", "naïve/ж.png")}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("tree", write_folder),
        ("tree.zip", write_zip),
        ("tree.zip", lambda path, files: write_zip(path, files, zipfile.ZIP_DEFLATED)),
        ("tree.ZIP", lambda path, files: write_zip(path, files, zipfile.ZIP_BZIP2)),
        ("tree.tar", write_tar),
        ("tree.tar", lambda path, files: write_tar(path, {f"./{name}": data for name, data in files.items()})),
        ("tree.tar.gz", lambda path, files: write_tar(path, files, "w:gz")),
        ("tree.txz", lambda path, files: write_tar(path, files, "w:xz")),
    ],
)
def test_every_kind_of_source_gives_the_same_images_by_name(tmp_path, name, write):
    source = open_source(write(tmp_path / name, TREE))
    assert [item.name for item in source.items] == sorted(IMAGES)
    assert contents(source) == IMAGES
    assert list(contents(source)) == list(IMAGES) or name in ("tree.tar.gz", "tree.txz")
    # A hidden folder of one file, which is not looked into, counts as that file does in an archive.
    assert source.ignored == len(TREE) - len(IMAGES) and source.others["hidden"] == 4
    assert source.left_out() == ["6 other files left out, no images: 4 hidden, 1 .txt, 1 .db"]


def test_items_say_where_their_bytes_are_and_stay_small(tmp_path):
    files = faces(40)
    for path in (write_zip(tmp_path / "a.zip", files), write_tar(tmp_path / "a.tar", files)):
        source = open_source(path)
        assert len(pickle.dumps(source.items)) < 300 * len(files)
        assert {item.name: item.read() for item in pickle.loads(pickle.dumps(source.items))} == files


def test_chunks_are_bounded_and_pass_over_what_is_not_wanted(tmp_path, monkeypatch):
    files = {f"{n:02}.png": bytes(1000) for n in range(20)}
    source = open_source(write_zip(tmp_path / "a.zip", files))
    chunks = list(source.chunks(lambda number: number % 2 == 0, images=4))
    assert [numbers for numbers, _ in chunks] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    monkeypatch.setattr(archive, "CHUNK_BYTES", 2500)
    source = open_source(write_tar(tmp_path / "a.tar.gz", files, "w:gz"))
    assert [len(items) for _, items in source.chunks(lambda number: number != 3, images=4)] == [2] * 9 + [1]


def test_links_to_folders_are_followed_once_and_to_nothing_are_reported(tmp_path):
    write_folder(tmp_path / "real", {"1.png": PNG, "2.png": PNG})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "file.png").symlink_to(tmp_path / "real" / "1.png")
    (tmp_path / "set" / "nothing.png").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    found = contents(open_source(tmp_path / "set"))
    assert found["train/1.png"] == found["file.png"] == PNG
    assert "link to nothing" in found["nothing.png"] and "regular" in found["pipe.png"]
    assert list(found) == ["file.png", "nothing.png", "pipe.png", "train/1.png", "train/2.png"]


def test_a_file_that_becomes_a_pipe_or_grows_is_no_trap(tmp_path, monkeypatch):
    write_folder(tmp_path, {"1.png": PNG, "2.png": PNG, "3.png": PNG})
    source = open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").unlink()
    for item in source.items[:2]:  # in place of a file that was listed: not what the user meant
        refuses(item.read, item.name, "has changed")
    monkeypatch.setattr(archive, "MAX_BYTES", len(PNG) - 1)
    with pytest.raises(Rejected, match="more than"):
        source.items[2].read()


def test_links_in_a_circle_and_to_a_device_are_reported(tmp_path):
    write_folder(tmp_path, {"1.png": PNG})
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "null.png").symlink_to("/dev/null")
    found = contents(open_source(tmp_path))
    assert found.pop("1.png") == PNG and set(found) == {"a.png", "b.png", "null.png"}
    assert "levels" in found["a.png"] and "levels" in found["b.png"] and "regular" in found["null.png"]


# --- names


@pytest.mark.parametrize("name", ["./" * 10**6 + "x.png", "a/" * 3000 + "x.png", "n" * 5000 + ".png"])
def test_endless_names_are_rejected_or_read_at_once(tmp_path, name):
    """In time that does not grow with the square of their length: a name of some KB took hours."""
    packed = write_tar(tmp_path / "b.tgz", {name[-900_000:]: PNG, "b.png": PNG}, "w:gz")
    sources = [packed, write_zip(tmp_path / "a.zip", {name[-60_000:]: PNG, "b.png": PNG})]
    for source in map(open_source, sources):
        found = contents(source)
        make_plan(source)
        assert found.pop("b.png") == PNG and len(found) == 1
        ((label, reason),) = found.items()
        assert (label, reason) == ("x.png", PNG) or (len(label) == 200 and "characters" in reason)


# --- zip


def test_names_that_lead_elsewhere_are_labels(tmp_path):
    names = ["../../escaped.png", "/absolute.png", "C:\\windows\\x.png", "a/../../b.png"]
    for path in (
        write_zip(tmp_path / "a.zip", dict.fromkeys(names, PNG)),
        write_tar(tmp_path / "a.tar", dict.fromkeys(names, PNG)),
    ):
        assert sorted(contents(open_source(path))) == sorted(name.replace("\\", "/") for name in names)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_files_with_one_name_the_last_is_taken(tmp_path):
    members = [("a.png", b"first"), ("b.png", b"b"), ("a.png", b"second"), ("a.png", b"third")]
    for path in (write_zip(tmp_path / "a.zip", members), write_tar(tmp_path / "a.tar", members)):
        source = open_source(path)
        read = [item for _, items in source.chunks(lambda number: True) for item in items]
        assert [item.name for item in read] == ["a.png", "a.png", "a.png", "b.png"]
        assert [item.read() for item in read[2:]] == [b"third", b"b"]
        for item in read[:2]:
            with pytest.raises(Rejected, match="again"):
                item.read()


def patched(path, name, **fields):
    """Sets fields of a member's header in the central directory: flags, method, crc, packed, size, offset, mode."""
    places = {"flags": 8, "method": 10, "crc": 16, "packed": 20, "size": 24, "mode": 40, "offset": 42}
    data = bytearray(path.read_bytes())
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    for field, value in fields.items():
        struct.pack_into("<H" if field in ("flags", "method", "mode") else "<I", data, at + places[field], value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"flags": 1}, "encrypted"),
        ({"mode": stat.S_IFLNK | 0o777}, "link"),
        ({"method": 14}, "method 14"),
        ({"method": 8}, "damaged"),
        ({"crc": 1}, "checksum"),
        ({"packed": 5}, "checksum"),
        ({"size": 5}, "checksum"),
        ({"size": 2**31}, "bytes, more than"),
        ({"packed": 2**31}, "bytes, more than"),
        ({"packed": 2**20}, "ends too soon"),
        ({"offset": 3}, "no local header"),
        ({"offset": 2**31}, "ends too soon"),
    ],
)
def test_a_zip_member_that_cannot_be_read_is_rejected_alone(tmp_path, fields, reason):
    path = patched(write_zip(tmp_path / "a.zip", {"a.png": PNG, "b.png": PNG}), "a.png", **fields)
    found = contents(open_source(path))
    assert reason in found["a.png"] and found["b.png"] == PNG


def test_a_deflate_bomb_is_cut_off(tmp_path):
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bomb.compress(bytes(2**24)) + bomb.flush()
    path = write_zip(tmp_path / "a.zip", {"a.png": packed, "b.png": PNG})
    item = open_source(patched(path, "a.png", method=8, size=1000)).items[0]
    with pytest.raises(Rejected, match="length"):
        item.read()


def test_a_zip_behind_other_bytes_and_damaged_zips(tmp_path):
    whole = write_zip(tmp_path / "a.zip", {"a.png": PNG}).read_bytes()
    path = tmp_path / "b.zip"
    path.write_bytes(b"#!/bin/sh\n" * 10 + whole)
    assert contents(open_source(path)) == {"a.png": PNG}
    for damaged in (b"", b"PK", whole[:-30], whole.replace(b"PK\1\2", b"PK\1\3")):
        path.write_bytes(damaged)
        refused(path, path, "not a readable zip")
    path.write_bytes(whole[len(PNG) :])
    assert "damaged" in contents(open_source(path))["a.png"]


def test_a_zip_member_without_a_name_is_no_image(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"?.png": PNG, "b.png": PNG})
    path.write_bytes(path.read_bytes().replace(b"?.png", b"\0.png"))
    assert list(contents(open_source(path))) == ["b.png"]


def test_archives_inside_are_named_where_there_is_nothing_else(tmp_path):
    inner = write_zip(tmp_path / "img.zip", {"a.png": PNG}).read_bytes()
    refused(write_zip(tmp_path / "a.zip", {"Img/img.zip": inner, "note.txt": b""}), "no images", "Img/img.zip")
    source = open_source(write_zip(tmp_path / "a.zip", {"Img/img.zip": inner, "a.png": PNG}))
    assert list(contents(source)) == ["a.png"] and source.nested == ["Img/img.zip"] and source.ignored == 1


# --- tar


def test_tar_members_that_are_no_files(tmp_path):
    members = [("real.png", PNG)]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        info = tarfile.TarInfo(f"kind{ord(kind)}.png")
        info.type, info.linkname = kind, "/etc/passwd"
        members.append((info, b""))
    for path in (write_tar(tmp_path / "a.tar", members), write_tar(tmp_path / "a.tgz", members, "w:gz")):
        found = contents(open_source(path))
        assert found.pop("real.png") == PNG and len(found) == 4
        assert all("link" in reason or "regular" in reason for reason in found.values())


def test_a_tar_that_is_cut_or_damaged_is_refused_not_shortened(tmp_path):
    files = {f"{n}.png": bytes([n]) * 1000 for n in range(5)}
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    path = tmp_path / "b.tar"
    header = 1536 * 2  # of the third member
    for damaged in (
        b"",
        b"junk" * 300,
        whole[: header + 100],
        whole[: header + 700],
        whole[:header],
        whole + whole,
        whole[:header] + b"\xff" * 512 + whole[header + 512 :],
    ):
        path.write_bytes(damaged)
        refused(path, path, "not a readable tar")
    packed = bytearray(write_tar(tmp_path / "a.tar.gz", files, "w:gz").read_bytes())
    path = tmp_path / "b.tar.gz"
    packed[-6] ^= 1  # the checksum at the end
    for damaged in (b"", packed[: len(packed) // 2], packed):
        path.write_bytes(damaged)
        refused(path, path, "not a readable tar")


def sparse(blocks):
    """A tar of one sparse member, with so many blocks that say where its holes are."""
    info = tarfile.TarInfo("s.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # more of them follow
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = bytearray(512)
    more[504] = 1
    return bytes(header) + bytes(more) * blocks + bytes(512 * 20)


def test_headers_without_end_are_not_held_in_memory(tmp_path):
    long = tarfile.TarInfo("a.png")
    long.pax_headers = {"comment": "x" * 2 * archive.MAX_HEADERS}
    with tarfile.open(tmp_path / "globals.tgz", "w:gz", pax_headers={f"k{n}": "v" for n in range(100)}) as out:
        out.addfile(tarfile.TarInfo("a.png"))
    bombs = [tmp_path / "globals.tgz", write_tar(tmp_path / "first.tgz", [(long, PNG)], "w:gz")]
    bombs += [
        write_tar(tmp_path / f"second.{kind}", [("0.png", PNG), (long, PNG)], mode)
        for kind, mode in (("tar", "w"), ("txz", "w:xz"))
    ]
    bombs.append(tmp_path / "sparse.tar")
    bombs[-1].write_bytes(sparse(archive.MAX_HEADERS // 512))
    for path in bombs:
        refused(path, path, "not a readable tar", "headers")
    long.pax_headers = {"comment": "x" * (archive.MAX_HEADERS // 2)}
    assert contents(open_source(write_tar(tmp_path / "long.tar", [(long, PNG)]))) == {"a.png": PNG}


def test_a_compressed_tar_that_changes_while_it_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tgz", {"a.png": PNG, "b.png": PNG}, "w:gz")
    source = open_source(path)
    write_tar(path, {"a.png": PNG}, "w:gz")
    with pytest.raises(UserError, match="changed"):
        contents(source)


# --- several archives


def test_shards_by_pattern_braces_and_folder(tmp_path):
    (tmp_path / "shards").mkdir()
    for n in range(3):
        files = {f"{key:03}.{kind}": PNG for key in (1, 2) for kind in ("jpg", "json", "cls")}
        write_tar(tmp_path / "shards" / f"set-{n:03}.tar", files)
    expected = [f"set-{n:03}.tar/{key:03}.jpg" for n in range(3) for key in (1, 2)]
    for pattern in (
        "shards/set-{000..002}.tar",
        "shards/*.tar",
        "shards/set-00[012].tar",
        "shards",
        "shards/set-{000,001,002}.tar",
    ):
        assert list(contents(open_source(tmp_path / pattern))) == expected, pattern
    assert list(contents(open_source(tmp_path / "shards/set-{001..001}.tar"))) == ["001.jpg", "002.jpg"]
    refused(tmp_path / "shards/set-{000..003}.tar", "set-003.tar")
    refused(tmp_path / "shards/*.zip", "no file matches")
    refused(tmp_path / "shards/set-{2..0}.tar", "count")
    write_zip(tmp_path / "shards" / "a.zip", {"a.png": PNG})
    refused(tmp_path / "shards", "both")


def test_the_parts_of_a_download_from_google_drive(tmp_path):
    write_zip(tmp_path / "faces-20260101T000000Z-001.zip", {"faces/a/1.png": b"1", "faces/b/2.png": b"2"})
    write_zip(
        tmp_path / "faces-20260101T000000Z-002.zip", {"faces/a/3.png": b"3", "faces/list_eval_partition.txt": b""}
    )
    write_zip(tmp_path / "other-001.zip", {"x.png": b"x"})
    for name in ("faces-20260101T000000Z-001.zip", "faces-20260101T000000Z-002.zip", "faces-*.zip"):
        source = open_source(tmp_path / name)
        assert contents(source) == {"faces/a/1.png": b"1", "faces/a/3.png": b"3", "faces/b/2.png": b"2"}
        assert [item.name for item in source.lists] == ["faces/list_eval_partition.txt"]
    assert list(contents(open_source(tmp_path / "other-001.zip"))) == ["x.png"]
    # A number that is no part's.
    assert list(contents(open_source(write_zip(tmp_path / "size-128.zip", {"x.png": b"x"})))) == ["x.png"]
    write_zip(tmp_path / "faces-20260101T000000Z-004.zip", {"y.png": b"y"})
    refused(tmp_path / "faces-20260101T000000Z-001.zip", "-003.zip is missing")


def test_paths_with_nothing_to_read(tmp_path):
    refused(tmp_path / "absent", "no such file")
    refused(tmp_path, "no images")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "archive")
    refused(write_zip(tmp_path / "a.zip", {}), "no images")
    refused(tmp_path / "*.txt", "no archive")
