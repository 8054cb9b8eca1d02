"""Kinds of files, by suffix or first bytes: images that are read, images that are not, and data of another kind.

A file whose name says nothing is looked into: a missing or odd suffix must not drop an image.
"""

import re

# Suffixes of the formats in `bvae.data.decoders.pillow.FORMATS`.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".avif", ".avifs", ".gif", ".qoi"),
    *(".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".tga", ".pcx", ".sgi"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), "a camera's raw file"),
    **{".jxl": "JPEG XL", ".psd": "Photoshop's format", ".exr": "OpenEXR", ".hdr": "Radiance HDR", ".pfm": "PFM"},
    **{".svg": "SVG", ".ico": "an icon", ".dds": "DDS", ".eps": "PostScript", ".dcm": "DICOM"},
}
"""suffix -> name of formats of images that are not read"""

# Files of these kinds are not looked into.
DATA_SUFFIXES = {
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".htm", ".log", ".cls"),
    *(".npy", ".npz", ".py", ".ipynb", ".pdf", ".mp4", ".mov", ".avi", ".mkv", ".wav", ".mp3", ".flac", ".mat"),
    *(".pkl", ".pickle", ".pt", ".pth", ".h5", ".hdf5", ".parquet", ".arrow", ".mdb", ".db", ".bin", ".gz", ".bz2"),
    *(".xz", ".zst", ".zip", ".tar", ".7z", ".rar", ".tfrecord", ".safetensors", ".onnx", ".ini", ".cfg", ".toml"),
    *(".sh", ".lock", ".tmp", ".idx", ".rec"),
}

HEAD = 64  # bytes that `image_format` looks at
_IMAGES = (
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"P[1-6][\s#]", "PPM"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"qoif", "QOI"),
)
_UNREAD_IMAGES = (
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "HEIC"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"8BPS", "Photoshop's format"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
)
_CONTENTS = (
    (
        rb"\s*<(!doctype|html|\?xml|head|body)",
        "an HTML page or XML, perhaps a server's answer instead of the file",
    ),
    (rb"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with `git lfs pull`"),
    (rb"PAR1", "a parquet file"),
    (rb"ARROW1|FEA1", "an Arrow file"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"SQLite format 3", "an SQLite database"),
    (rb"\x1f\x8b", "gzip's format"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard's format"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a RAR archive"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"%PDF", "a PDF"),
    (rb"%!PS", "PostScript"),
)

# Containers of images that are not read here, each with a way out.
CONVERT = "docs/data.md shows how to take the images out"
CONTAINERS = {
    ".parquet": f"parquet; {CONVERT}",
    ".arrow": f"Arrow, as of Hugging Face's datasets; {CONVERT}",
    ".feather": f"Arrow; {CONVERT}",
    ".mdb": f"LMDB; {CONVERT}",
    ".lmdb": f"LMDB; {CONVERT}",
    **dict.fromkeys((".h5", ".hdf5"), f"HDF5; {CONVERT}"),
    **dict.fromkeys((".tfrecord", ".tfrecords"), f"TensorFlow's records; {CONVERT}"),
    ".rec": f"MXNet's records; {CONVERT}",
    ".beton": f"FFCV's format; {CONVERT}",
    **dict.fromkeys((".pkl", ".pickle"), "a pickle, which could run code; save its arrays with numpy.savez"),
    **dict.fromkeys((".pt", ".pth"), "torch's format; save its uint8 tensors with numpy.savez"),
    ".safetensors": "safetensors; save its uint8 tensors with numpy.savez",
    **dict.fromkeys((".7z", ".rar"), "an archive of this kind; unpack it into a folder"),
    **dict.fromkeys((".tar.zst", ".tzst"), "Zstandard: Python 3.14 or `pip install backports.zstd` reads it"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv"), "a video; take its frames out, with ffmpeg"),
}


def image_format(head: bytes) -> tuple[str, bool] | None:
    """(name of the format, whether it is read) of a file that begins with these bytes, or None if it is no image."""
    for table, is_read in ((_IMAGES, True), (_UNREAD_IMAGES, False)):
        for pattern, name in table:
            if re.match(pattern, head, re.DOTALL):
                return name, is_read
    return None


def content(head: bytes) -> str | None:
    """The kind of a file that begins with these bytes and is not the image it should be; None if it is unknown."""
    for pattern, name in _CONTENTS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return name
    return None


def suffix(name: str) -> str:
    """The end of a name from its last dot on, in small letters, with `.tar` where that comes before: `.tar.zst`."""
    base = name.rpartition("/")[2].lower()
    stem, dot, end = base.rpartition(".")
    if not dot or not stem:
        return ""
    return f".tar.{end}" if stem.endswith(".tar") else f".{end}"


def container(name: str) -> str | None:
    """The kind of a file with this name and how to convert it, if the kind may hold images; else None."""
    return CONTAINERS.get(suffix(name))
