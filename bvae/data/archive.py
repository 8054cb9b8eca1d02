"""Where encoded images come from: folders, zip and tar archives, sequences of them; as lists of small items.

Nothing is ever unpacked: an item says where its bytes lie, and whoever decodes it, in whatever process, reads them
there. So a name is only a label: one that begins with `/` or holds `..` names no file that could be written.
"""

import bz2
import contextlib
import glob
import importlib
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from bvae.data import kinds, lists
from bvae.data.kinds import SUFFIXES
from bvae.data.lists import split_word
from bvae.data.recipe import Item, Rejected
from bvae.data.refusal import refusal
from bvae.errors import UserError


def _optional(*names: str) -> Any:
    """The first of these modules that there is, or None."""
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


zstd = _optional("compression.zstd", "backports.zstd")  # of Python 3.14, or its like for those before
inflate64 = _optional("inflate64")

ZIPS = (".zip",)
PLAIN_TARS = (".tar",)
ZST_TARS = (".tar.zst", ".tzst") if zstd is not None else ()
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", *ZST_TARS)
ARCHIVES = (*ZIPS, *PLAIN_TARS, *PACKED_TARS)
NESTED = (*ARCHIVES, ".7z", ".rar")
METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}  # of a zip, by number
DEFLATE64 = 9

MAX_BYTES = 2**26  # of one encoded image: what a decoder holds in memory
MAX_NAME = 4096  # characters of a name in an archive; no file system takes longer paths
MAX_PACKED_HEAD = 2**20  # bytes of a member that are unpacked to see how it begins: a block of bzip2
MAX_HEADERS = 2**20  # bytes of headers before a member of a tar, which are held in memory
MAX_GLOBALS = 64  # values in a tar's global headers, which hold for all members that follow
CHUNK_IMAGES = 128  # of one piece of work for a decoder
CHUNK_BYTES = 2**22  # of one whose items hold their bytes

Kind = Literal["folder", "zip", "tar"]
Stamp = tuple[int, ...]


def stamp(status: os.stat_result) -> Stamp:
    """What tells a file from the same file changed, or another in its place: size, inode, times of change."""
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def check_stamp(path: str, taken: Stamp, now: os.stat_result | None) -> None:
    """Raises UserError where a file, now gone (None) or of another stamp, is not what it was when it was listed."""
    if now is None or stamp(now) != taken:
        raise refusal(path, "has changed while it was read: wait until nothing writes there, then start anew")


@dataclass(frozen=True, slots=True)
class FileItem:
    """An image in a file of its own; `name` is its path below `root`, `stamp` what it was when it was listed."""

    name: str
    root: str
    stamp: Stamp | None = None

    def read(self, size: int | None = None) -> bytes:
        """The file, or its first bytes. Raises UserError if it has changed since it was listed."""
        path = os.path.join(self.root, self.name)
        try:
            # Not to hang on a pipe that took the file's place.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if self.stamp is not None:
                    check_stamp(path, self.stamp, status)
                elif not stat.S_ISREG(status.st_mode):
                    raise Rejected("is not a regular file")
                return _read(file.fileno(), 0, status.st_size if size is None else size)
        except OSError as error:
            if self.stamp is not None and isinstance(error, FileNotFoundError | NotADirectoryError):
                check_stamp(path, self.stamp, None)
            raise Rejected(f"cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True, slots=True)
class TarItem:
    """A regular member of an uncompressed tar."""

    name: str
    archive: str
    offset: int
    size: int

    def read(self, size: int | None = None) -> bytes:
        return _read_part(self.archive, self.offset, self.size if size is None else min(self.size, size))


@dataclass(frozen=True, slots=True)
class ZipItem:
    """A member of a zip, by what the central directory says of it. Its checksum is checked."""

    name: str
    archive: str
    offset: int
    method: int
    packed: int
    size: int
    crc: int

    def read(self, size: int | None = None) -> bytes:
        """The member, or its first bytes, unchecked."""
        if size is None and max(self.packed, self.size) > MAX_BYTES:
            raise Rejected(_too_large(max(self.packed, self.size)))
        # The local header repeats the name and has an extra field of its own: only their lengths matter here.
        header = _read_part(self.archive, self.offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise Rejected("is damaged in the archive (no local header)")
        start = self.offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = _read_part(self.archive, start, self.packed if size is None else min(self.packed, MAX_PACKED_HEAD))
        most = self.size + 1 if size is None else size
        try:
            if self.method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
            elif self.method == zipfile.ZIP_BZIP2:
                data = bz2.BZ2Decompressor().decompress(data, most)
            elif self.method == DEFLATE64:
                data = _inflate64(data, most)
        except (zlib.error, OSError, ValueError) as error:
            raise Rejected(f"is damaged in the archive ({error})") from error
        if size is not None:
            return data[:size]
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise Rejected("is damaged in the archive (its length or checksum is wrong)")
        return data


@dataclass(frozen=True, slots=True)
class BytesItem:
    """An image that is in memory already."""

    name: str
    data: bytes

    def read(self, size: int | None = None) -> bytes:
        return self.data[:size]


@dataclass(frozen=True, slots=True)
class UnusableItem:
    """What the listing already shows to be no image that could be read."""

    name: str
    reason: str

    def read(self, size: int | None = None) -> bytes:
        raise Rejected(self.reason)


@dataclass(frozen=True, slots=True)
class PackedItem:
    """A member of a compressed tar, the `member`-th of the `archive`-th: there when `Source.chunks` comes past it."""

    name: str
    archive: int
    member: int

    def read(self, size: int | None = None) -> bytes:
        raise Rejected("is in a compressed tar, which can only be read from its start")


@dataclass
class Source:
    """The images of a folder or of archives.

    path: as it was given.
    kind: of what the images lie in.
    files: the archives in order; none for a folder.
    items: all images in a format that is read, by their name or, where that says nothing, by their first bytes; sorted
        by name (by code points), no name twice.
    unread: images in other formats: (name, reason).
    others: how many other files there are, by suffix; "hidden" are hidden files and folders, which are not looked into.
    nested: names of archives inside, which are not opened.
    lists: partition lists inside (`bvae.data.lists.is_list`).
    split_folders: paths of folders inside that have the name of a split, with images or without.
    stamps: of the archives, when they were listed.
    """

    path: str
    kind: Kind
    files: list[Path]
    items: list[Item] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    nested: list[str] = field(default_factory=list)
    lists: list[Item] = field(default_factory=list)
    split_folders: set[str] = field(default_factory=set)
    stamps: dict[str, Stamp] = field(default_factory=dict)

    @property
    def ignored(self) -> int:
        """Files that are no images."""
        return sum(self.others.values())

    def left_out(self) -> list[str]:
        """One line each for what is left out of this source: images that are not read, other files."""
        lines = []
        if self.unread:
            name, reason = self.unread[0]
            lines.append(f"{count(len(self.unread), 'image')} left out; the first: {name} {reason}")
        if self.others:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self.others.most_common(6))
            more = ", ..." if len(self.others) > 6 else ""
            lines.append(f"{count(self.ignored, 'other file')} left out, no images: {kinds}{more}")
        return lines

    def check_unchanged(self) -> None:
        """Raises UserError where an archive is not what it was when it was listed; items of a folder tell that."""
        for path, taken in self.stamps.items():
            try:
                now = os.stat(path)
            except OSError:
                now = None
            check_stamp(path, taken, now)

    def where(self, item: Item) -> str:
        """What to call an item in a message."""
        return os.path.join(self.path, item.name) if self.kind == "folder" else f"{self.path}[{item.name}]"

    def chunks(
        self, wanted: Callable[[int], bool], images: int = CHUNK_IMAGES
    ) -> Iterator[tuple[list[int], list[Item]]]:
        """Pieces of work of up to so many images: (numbers of the items in `items`, items that can be read).

        They come in the order of `items`, but for those in compressed tars, which come last and as they lie there;
        of those no more than `CHUNK_BYTES`, or a single one, are held at a time.
        """
        numbers: list[int] = []
        chunk: list[Item] = []
        held = 0
        for number, item in self._readable(wanted):
            size = len(item.data) if isinstance(item, BytesItem) else 0
            if chunk and (len(chunk) >= images or held + size > CHUNK_BYTES):
                yield numbers, chunk
                numbers, chunk, held = [], [], 0
            numbers.append(number)
            chunk.append(item)
            held += size
        if chunk:
            yield numbers, chunk

    def _readable(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Item]]:
        packed: dict[int, dict[int, int]] = {}
        for number, item in enumerate(self.items):
            if not wanted(number):
                continue
            if isinstance(item, PackedItem):
                packed.setdefault(item.archive, {})[item.member] = number
            else:
                yield number, item
        for archive, members in sorted(packed.items()):
            self.check_unchanged()
            for index, (member, tar) in enumerate(_walk_tar(self.files[archive])):
                if index in members:
                    number = members.pop(index)
                    yield number, _unpack(self.items[number].name, tar, member)
            if members:
                check_stamp(str(self.files[archive]), (), None)


def open_source(path: Path | str) -> Source:
    """Lists the images at a path.

    Args:
        path: a folder of images, at any depth; a .zip, .tar or compressed tar; a pattern of archives with `*`, `?`,
            `[...]` or `{000..123}`, `{a,b}`; a folder of archives. The first part of several zips, `...-001.zip` as
            Google Drive makes them, stands for all of them.

    Raises:
        UserError: if there is nothing of the kind, if an archive is damaged, and if there are no images in it.
    """
    text = str(path)
    if not os.path.exists(text) and re.search(r"[*?\[{]", text):
        source = _open_archives(text, _match(text))
    elif os.path.isdir(text):
        source = _open_folder(text)
    elif os.path.isfile(text):
        if not text.lower().endswith(ARCHIVES):
            is_here = kinds.container(text) or content_of(Path(text))
            hint = f"; this is {is_here}" if is_here else ""
            raise refusal(
                path, f"not a source of images: a folder or an archive ({', '.join(ARCHIVES)}) is expected{hint}"
            )
        source = _open_archives(text, _parts(Path(text)))
    else:
        raise refusal(path, "no such file or folder")
    if not source.items:
        raise refusal(path, f"holds no images ({', '.join(SUFFIXES[:4])}, ...){_inside(source)}")
    return source


def _inside(source: Source) -> str:
    """What there is in a source without images, for the end of a message."""
    if source.nested:
        return f"; the archives inside ({', '.join(sorted(source.nested)[:3])}) are not opened: take them out"
    for kind in source.others:
        if kind in kinds.CONTAINERS:
            return f"; its {kind} files are {kinds.CONTAINERS[kind]}"
    if ".npy" in source.others:
        return "; of its .npy files give one, or name them train.npy and test.npy"
    return "".join(f"; {line}" for line in source.left_out())


def content_of(path: Path) -> str | None:
    """What a file is by its first bytes (`kinds.content`), where it can be read and that can be told."""
    try:
        with open(path, "rb") as file:
            return kinds.content(file.read(kinds.HEAD))
    except OSError:
        return None


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _open_folder(root: str) -> Source:
    source = Source(root, "folder", [])
    archives = []
    for name, is_folder, taken in _walk_folder(root):
        if is_folder:
            if _is_hidden(name):
                source.others["hidden"] += 1
            else:
                _see_folder(source, name)
        else:
            item: Item = UnusableItem(name, _why_no_file(os.path.join(root, name)))
            if taken is not None:
                item = FileItem(name, root, taken)
            if _sort_in(source, item) and taken is not None and name.lower().endswith(ARCHIVES):
                archives.append(Path(root, name))
    if not source.items and archives:
        inside = _open_archives(root, sorted(archives), Path(root))
        inside.lists += source.lists
        inside.others += source.others
        for file in archives:  # they are not files left out, but the source
            inside.others[kinds.suffix(file.name)] -= 1
        inside.others = +inside.others
        return inside
    return _in_order(source)


def _open_archives(text: str, files: list[Path], root: Path | None = None) -> Source:
    """Several archives keep their names apart, for they may repeat them; the parts of one zip have one set of names."""
    zips = [file.name.lower().endswith(ZIPS) for file in files]
    if any(zips) != all(zips):
        raise refusal(text, f"holds both zip and tar archives ({files[0].name}, ...): name those of one kind")
    source = Source(text, "zip" if all(zips) else "tar", files)
    together = len({_part_of(file) for file in files}) == 1
    for number, file in enumerate(files):
        label = "" if together else (file.relative_to(root).as_posix() if root else file.name) + "/"
        source.stamps[str(file)] = _stamp_of(file)
        if source.kind == "zip":
            _list_zip(source, file, label)
        else:
            _list_tar(source, file, number, label)
    return _in_order(source)


def _stamp_of(file: Path) -> Stamp:
    try:
        return stamp(os.stat(file))
    except OSError as error:
        raise refusal(file, "cannot be read", error) from error


def _part_of(file: Path) -> str:
    """What an archive is a part of: the set that Google Drive's `...-001.zip` begins, or itself."""
    match = re.fullmatch(r"(.*-)\d{3}\.zip", str(file), re.IGNORECASE)
    first = Path(f"{match[1]}001{file.suffix}") if match else file
    return match[1] if match and first.exists() else str(file)


def _list_zip(source: Source, file: Path, label: str) -> None:
    # zipfile reports damage in many ways (BadZipFile, NotImplementedError, UnicodeDecodeError, ...).
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:
        raise _unreadable(file, "zip", error) from error
    for member in members:
        name = label + _clean(member.filename)
        if _pass_over_long(source, name):
            continue
        if name.endswith("/"):
            _see_folder(source, name.rstrip("/"))
            continue
        _sort_in(source, _zip_item(name, str(file), member))


def _unreadable(file: Path, kind: str, error: Exception) -> UserError:
    is_here = content_of(file)
    expected = is_here is None or kind in is_here or (kind == "tar" and is_here.endswith("format"))  # a packed one
    hint = "" if expected else f"; this is {is_here}"
    return refusal(file, f"not a readable {kind} archive{hint}", error)


def _zip_item(name: str, file: str, member: zipfile.ZipInfo) -> Item:
    if member.flag_bits & 1:
        return UnusableItem(name, "is encrypted")
    if stat.S_ISLNK(member.external_attr >> 16):
        return UnusableItem(name, "is a link")
    if member.compress_type == DEFLATE64 and inflate64 is None:
        return UnusableItem(name, "is compressed by Deflate64 (method 9), which `pip install inflate64` makes readable")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, DEFLATE64):
        method = METHODS.get(member.compress_type, "an unknown way")
        return UnusableItem(
            name, f"is compressed by {method} (method {member.compress_type}); stored, deflate and bzip2 can be read"
        )
    if member.header_offset < 0:
        return UnusableItem(name, "is damaged in the archive (it lies before the archive's start)")
    return ZipItem(
        name,
        file,
        member.header_offset,
        member.compress_type,
        member.compress_size,
        member.file_size,
        member.CRC,
    )


def _list_tar(source: Source, file: Path, number: int, label: str) -> None:
    packed = file.name.lower().endswith(PACKED_TARS)
    for index, (member, archive) in enumerate(_walk_tar(file)):
        name = label + _clean(member.name)
        if _pass_over_long(source, name):
            continue
        if member.isdir():
            _see_folder(source, name)
            continue
        item: Item
        if member.issym() or member.islnk():
            item = UnusableItem(name, "is a link")
        elif not member.isreg() or member.issparse():
            item = UnusableItem(name, "is not a regular file")
        elif member.size > MAX_BYTES:
            item = UnusableItem(name, _too_large(member.size))
        elif not packed:
            item = TarItem(name, str(file), member.offset_data, member.size)
        elif lists.is_list(name):
            item = _unpack(name, archive, member)
        else:
            item = PackedItem(name, number, index)
        if isinstance(item, PackedItem):  # its first bytes can be had now and not later
            _sort_in(source, item, lambda member=member, archive=archive: _head(archive, member))  # type: ignore[misc]
        else:
            _sort_in(source, item)


class _HeaderReader:
    """A tar's file, decompressed. Where `left` is a number, no more bytes than that are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left: int | None = MAX_HEADERS
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        if self.left is not None:
            self.left -= size
            if self.left < 0:
                raise tarfile.ReadError(f"headers of more than {MAX_HEADERS} bytes")
        return self._file.read(size)


class _Tar(tarfile.TarFile):
    """A tar open for reading. tarfile holds headers in memory, and a few KB can unpack to any size of them."""

    def __init__(self, name: str, mode: Literal["r"], fileobj: IO[bytes] | None = None, **options: Any) -> None:
        self._own = None if fileobj else open(name, "rb")  # noqa: SIM115 (closed below)
        self._headers = _HeaderReader(fileobj or self._own)  # type: ignore[arg-type]  # one of them is there
        try:
            super().__init__(name, mode, self._headers, **options)  # type: ignore[arg-type]
        except BaseException:
            if self._own:
                self._own.close()
            raise
        self._headers.left = None

    def next(self) -> tarfile.TarInfo | None:
        self._headers.left = MAX_HEADERS
        member = super().next()
        self._headers.left = None
        if len(self.pax_headers) > MAX_GLOBALS:
            raise tarfile.ReadError(f"more than {MAX_GLOBALS} global headers")
        return member

    def close(self) -> None:
        super().close()
        if self._own:
            self._own.close()


def _walk_tar(file: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of a tar, each while the archive stands at it, to the archive's end, where gzip has its checksum."""
    mode: Literal["r:", "r:*"] = "r:*" if file.name.lower().endswith(PACKED_TARS) else "r:"
    try:
        if ZST_TARS and file.name.lower().endswith(ZST_TARS):
            archive = _Tar.open(file, "r:", fileobj=zstd.ZstdFile(file))
        else:
            archive = _Tar.open(file, mode)
    except Exception as error:  # tarfile, gzip and zlib report damage in many ways
        raise _unreadable(file, "tar", error) from error
    with archive:
        while True:
            try:
                member = archive.next()
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps what it has seen
                if member is None:
                    _check_end(archive)
            except Exception as error:
                raise refusal(file, "not a readable tar archive", error) from error
            if member is None:
                return
            yield member, archive


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes for the archive's end a damaged header, the file's end, and where another archive follows."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    mark = file.read(tarfile.BLOCKSIZE)
    if any(mark):
        raise tarfile.ReadError(f"damaged at byte {archive.offset}")
    if len(mark) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut off: it has no mark of its end")
    while rest := file.read(2**20):
        if rest.count(0) != len(rest):
            raise tarfile.ReadError(f"it goes on behind the mark of its end, at byte {archive.offset}")


def _head(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = archive.extractfile(member)
        return file.read(kinds.HEAD) if file else b""
    except Exception as error:
        raise refusal(Path(str(archive.name)), "not a readable tar archive", error) from error


def _inflate64(data: bytes, most: int) -> bytes:
    """Deflate64, up to about so many bytes. Raises ValueError where it is damaged."""
    inflater, parts, size = inflate64.Inflater(), [], 0
    for start in range(0, len(data), 2**14):
        parts.append(inflater.inflate(data[start : start + 2**14]))
        size += len(parts[-1])
        if size > most:
            break
    return b"".join(parts)


def _unpack(name: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Item:
    try:
        file = archive.extractfile(member)
        assert file is not None  # only regular members come here
        return BytesItem(name, file.read())
    except Exception as error:
        raise refusal(Path(str(archive.name)), "not a readable tar archive", error) from error


def _walk_folder(root: str) -> Iterator[tuple[str, bool, Stamp | None]]:
    """(path below root, is a folder, stamp of a regular file) of all there is; links are followed, no folder twice."""
    seen = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                found = [(os.path.join(folder, entry.name), *_kind(entry)) for entry in entries]
        except OSError as error:
            raise refusal(path, "cannot be read", error) from error
        found.sort()
        yield from found
        folders += [name for name, is_folder, _ in reversed(found) if is_folder and not _is_hidden(name)]


def _kind(entry: os.DirEntry[str]) -> tuple[bool, Stamp | None]:
    """(is a folder, stamp of a regular file), links followed; neither where that cannot be told: links in a circle."""
    try:
        if entry.is_dir():
            return True, None
        status = entry.stat()
        return False, stamp(status) if stat.S_ISREG(status.st_mode) else None
    except OSError:
        return False, None


def _why_no_file(path: str) -> str:
    try:
        os.stat(path)
    except FileNotFoundError:
        return "cannot be read (a link to nothing)"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "is not a regular file"


def _sort_in(source: Source, item: Any, head: Callable[[], bytes] | None = None) -> bool:
    """Puts a file where it belongs, by its name or by how it begins (`head`); whether it is a nested archive."""
    kind = kinds.suffix(item.name)
    if not _base(item.name):
        source.others["without a name"] += 1
    elif _is_hidden(item.name):
        source.others["hidden"] += 1
    elif kind in SUFFIXES:
        source.items.append(item)
    elif kind in kinds.UNREAD:
        source.unread.append((item.name, _unread(kinds.UNREAD[kind])))
    elif lists.is_list(item.name):
        source.lists.append(item)
    elif kind not in kinds.DATA_SUFFIXES and (found := kinds.image_format(head() if head else _begin(item))):
        name, is_read = found
        if is_read:
            source.items.append(item)
        else:
            source.unread.append((item.name, _unread(name)))
    else:
        source.others[kind or "without suffix"] += 1
        if item.name.lower().endswith(NESTED):
            source.nested.append(item.name)
            return True
    return False


def _unread(name: str) -> str:
    return f"is {name}, which is not read: convert it to PNG or JPEG"


def _begin(item: Any) -> bytes:
    try:
        return item.read(kinds.HEAD)
    except Rejected:
        return b""


def _pass_over_long(source: Source, name: str) -> bool:
    """Whether a name is too long to be one; the file it is of is then sorted in under its beginning."""
    if len(name) <= MAX_NAME:
        return False
    if name.lower().endswith(SUFFIXES):
        source.items.append(UnusableItem(name[:200], f"has a name of {len(name)} characters, which begins so"))
    else:
        source.others["of endless names"] += 1
    return True


def _see_folder(source: Source, name: str) -> None:
    word = split_word(_base(name))
    if word is not None and word.exact:
        source.split_folders.add(name)


def _in_order(source: Source) -> Source:
    """Sorts by name. Of files with one name the last is kept, as when an archive is unpacked."""
    source.items.sort(key=lambda item: item.name)
    source.unread.sort()
    last: dict[str, int] = {}
    repeated = []
    for number, item in enumerate(source.items):
        if item.name in last:
            repeated.append(last[item.name])
        last[item.name] = number
    for number in repeated:
        source.items[number] = UnusableItem(source.items[number].name, "is there again, and the later one is taken")
    return source


def _clean(name: str) -> str:
    return re.sub(r"^(\./)+", "", name.replace("\\", "/"))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _is_hidden(name: str) -> bool:
    """Hidden files and folders, and what macOS puts beside the files in a zip."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def _parts(file: Path) -> list[Path]:
    """All parts of the set of zips that a `...-001.zip` begins, or the file alone."""
    match = re.fullmatch(r"(.*-)(\d{3})(\.zip)", file.name, re.IGNORECASE)
    if not match:
        return [file]
    stem, number_text, suffix = match.groups()
    if number_text != "001" and not file.with_name(f"{stem}001{suffix}").exists():
        return [file]  # another number, such as the images' size
    parts = sorted(file.parent.glob(f"{glob.escape(stem)}[0-9][0-9][0-9]{suffix}"))
    for number, part in enumerate(parts, 1):
        if part.name != f"{stem}{number:03}{suffix}":
            raise refusal(file, f"is one of several parts, and {stem}{number:03}{suffix} is missing")
    return parts


def _match(pattern: str) -> list[Path]:
    files: list[Path] = []
    for text in _expand(pattern):
        if re.search(r"[*?\[]", text):
            files += [Path(found) for found in sorted(glob.glob(text, recursive=True))]
        elif os.path.isfile(text):
            files.append(Path(text))
        else:
            raise refusal(pattern, f"no such file: {text}")
    if not files:
        raise refusal(pattern, "no file matches this pattern")
    for file in files:
        if not file.name.lower().endswith(ARCHIVES) or not file.is_file():
            raise refusal(pattern, f"{file} is no archive ({', '.join(ARCHIVES)})")
    return list(dict.fromkeys(files))


def _expand(pattern: str) -> Iterable[str]:
    """Braces as the shell's: `{000..123}` counts, keeping the width; `{a,b}` lists."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    inner = match.group(1)
    if numbers := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inner):
        first, last = numbers.groups()
        if not 0 <= int(last) - int(first) < 10**6:
            raise UserError(f"{pattern}: {{{inner}}} does not count upwards, or too far")
        words: Iterable[str] = (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
    else:
        words = inner.split(",")
    return (done for word in words for done in _expand(pattern[: match.start()] + word + pattern[match.end() :]))


def _read_part(path: str, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            data = _read(file.fileno(), offset, size)
    except (OSError, OverflowError) as error:
        raise Rejected(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(data) != size:
        raise Rejected("is damaged in the archive (it ends too soon)")
    return data


def _read(descriptor: int, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise Rejected(_too_large(size))
    return os.pread(descriptor, size, offset)


def _too_large(size: int) -> str:
    return f"has {size} bytes, more than the {MAX_BYTES} accepted"
