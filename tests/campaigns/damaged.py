"""Damaged archives: each flipped bit, cut, exchanged or added file is refused in one line, or does no harm; never another
answer.

    python -m campaigns.damaged [--count 1000] [--archive NAME.mar] [--seed 0]

Some are damages of a disk or a copy; others are what someone makes who unzips, changes and zips again, so that every
checksum of the zip is right. What is not refused is loaded, and has to answer as the whole archive does.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import statistics
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from traceserve.archives.contents import read_manifest, read_serving, unpack
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tasks.contract import Request

from campaigns.aims import Aim, archive_of, main_of, none_of

TEXTS = ("The boat is small.", "Where is my order?", "No.")


class Whole(NamedTuple):
    """The undamaged archive: its bytes, where things lie in it, its files and its answers."""

    content: bytes
    headers: List[int]
    directory: int
    files: Dict[str, bytes]
    answers: List[object]


Damage = Callable[[Whole, random.Random], bytes]


def _flipped(content: bytes, position: int, noise: random.Random) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << noise.randrange(8)]) + content[position + 1 :]


def anywhere(whole: Whole, noise: random.Random) -> bytes:
    """One bit of the whole file, so mostly of the weights."""
    return _flipped(whole.content, noise.randrange(len(whole.content)), noise)


def in_a_header(whole: Whole, noise: random.Random) -> bytes:
    """One bit of a file's header in the zip."""
    return _flipped(whole.content, noise.choice(whole.headers) + noise.randrange(30), noise)


def in_the_directory(whole: Whole, noise: random.Random) -> bytes:
    """One bit of the zip's directory."""
    return _flipped(whole.content, noise.randrange(whole.directory, len(whole.content)), noise)


def cut(whole: Whole, noise: random.Random) -> bytes:
    """The beginning alone."""
    return whole.content[: noise.randrange(len(whole.content))]


def a_hole(whole: Whole, noise: random.Random) -> bytes:
    """A block of zeros, as of a disk."""
    start = noise.randrange(len(whole.content))
    length = min(4096, len(whole.content) - start)
    return whole.content[:start] + bytes(length) + whole.content[start + length :]


def a_block_twice(whole: Whole, noise: random.Random) -> bytes:
    """A block in another one's place."""
    at, of = (noise.randrange(max(1, len(whole.content) - 512)) for _ in range(2))
    return whole.content[:at] + whole.content[of : of + 512] + whole.content[at + 512 :]


def zipped(files: Dict[str, bytes], twice: str = "") -> bytes:
    """A zip of these files, one of them named twice."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as sink:
        for name, content in files.items():
            sink.writestr(name, content)
        if twice:
            sink.filelist.append(sink.getinfo(twice))
    return target.getvalue()


def rezipped_with_a_bit(whole: Whole, noise: random.Random) -> bytes:
    """One bit of a file, and a zip that is right about it."""
    name = noise.choice([name for name, content in whole.files.items() if content])
    content = whole.files[name]
    return zipped({**whole.files, name: _flipped(content, noise.randrange(len(content)), noise)})


def exchanged(whole: Whole, noise: random.Random) -> bytes:
    """Two files' contents exchanged."""
    one, other = noise.sample(sorted(whole.files), 2)
    return zipped({**whole.files, one: whole.files[other], other: whole.files[one]})


def left_out(whole: Whole, noise: random.Random) -> bytes:
    """Without one file."""
    name = noise.choice(sorted(whole.files))
    return zipped({key: content for key, content in whole.files.items() if key != name})


def added(whole: Whole, noise: random.Random) -> bytes:
    """With code that would shadow a library, or a name that leads out."""
    names = ("json.py", "numpy/__init__.py", "../x.py", "tokenizers.so", "traceserve_runtime/json.py", "a/../../x")
    return zipped({**whole.files, noise.choice(names): b"raise SystemExit('a stranger ran')\n"})


def named_twice(whole: Whole, noise: random.Random) -> bytes:
    """One name twice in the directory."""
    return zipped(whole.files, twice=noise.choice(sorted(whole.files)))


DAMAGES: Dict[str, Damage] = {
    "a bit anywhere": anywhere,
    "a bit of a header": in_a_header,
    "a bit of the directory": in_the_directory,
    "cut": cut,
    "a block of zeros": a_hole,
    "a block in another's place": a_block_twice,
    "a bit of a file, zipped again": rezipped_with_a_bit,
    "two files exchanged": exchanged,
    "a file left out": left_out,
    "a file added": added,
    "a file twice": named_twice,
}


def whole_archive(path: Path, folder: Path) -> Whole:
    """Read the undamaged archive, and ask it."""
    unpack(path, folder)
    with zipfile.ZipFile(path) as file:
        headers = [info.header_offset for info in file.infolist()]
        files = {name: file.read(name) for name in file.namelist()}
        return Whole(path.read_bytes(), headers, file.start_dir, files, _answers(folder))


def _answers(folder: Path) -> List[object]:
    return list(Engine.load(folder).answer([Request({"text": text}, {}) for text in TEXTS]))


def outcome(archive: Path, folder: Path, whole: Whole) -> str:
    """Load a damaged archive as a server does: refused, harmless, or what went wrong."""
    try:
        read_manifest(archive)
        read_serving(archive)
        unpack(archive, folder)
        Manifest.read(folder)
        answers = _answers(folder)
    except TraceserveError as error:
        return "refused" if error.message and "\n" not in error.message else "refused in several lines"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "harmless" if answers == whole.answers else "another answer"


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Damage, load, and compare."""
    source = archive_of(options, folder)
    whole, noise = whole_archive(source, folder / "whole"), random.Random(options.seed)
    found: Counter[str] = Counter()
    wrong: List[str] = []
    seconds: List[float] = []
    damaged, kinds = folder / source.name, list(DAMAGES.items())
    for number in range(options.count):
        kind, damage = kinds[number % len(kinds)]
        damaged.write_bytes(damage(whole, noise))
        began = time.perf_counter()
        result = outcome(damaged, folder / "unpacked", whole)
        seconds.append(time.perf_counter() - began)
        shutil.rmtree(folder / "unpacked", ignore_errors=True)
        found[result] += 1
        if result not in ("refused", "harmless"):
            wrong.append(f"{number}, {kind}: {result}")
    for line in wrong[:20]:
        print(line)
    answers = found["another answer"]
    median = statistics.median(seconds)
    return [
        none_of("another answer", answers, options.count),
        none_of("neither refused in one line nor harmless", len(wrong) - answers, options.count),
        Aim("refused", "-", f"{found['refused']:,} of {options.count:,}", found["refused"] > 0),
        Aim("harmless: dates, attributes", "-", f"{found['harmless']:,} of {options.count:,}", True),
        Aim("time to decide, median", "-", f"{median * 1000:.0f} ms", True),
        *_signature(source, folder),
    ]


def _signature(source: Path, folder: Path) -> Sequence[Aim]:
    """What demanding a signature costs; nothing without the package."""
    try:
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ec
        from traceserve.archives import signing
    except ImportError:
        return []
    key = ec.generate_private_key(ec.SECP256R1())
    private, public, signed = folder / "key.pem", folder / "public.pem", folder / "signed" / source.name
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    signed.parent.mkdir()
    shutil.copyfile(source, signed)
    signing.sign_archive(signed, private)
    seconds: List[float] = []
    for _ in range(5):
        began = time.perf_counter()
        with signing.verified([signed], public):
            seconds.append(time.perf_counter() - began)
    median, size = statistics.median(seconds), source.stat().st_size / 1e6
    most = seconds_to_check(size)
    return [
        Aim(
            f"checking the signature of {size:.0f} MB",
            f"{most:.2f} s",
            f"{median:.2f} s",
            median < most,
            of_machine=True,
        )
    ]


def seconds_to_check(size: float) -> float:
    """The aim for an archive of so many MB: 0.3 s for 92 MB, of which 0.05 s are independent of the size."""
    return 0.05 + 0.25 * size / 92


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=1000, help="damaged archives [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other damages for another number [%(default)s]")


def run(count: int, archive: Optional[Path], folder: Path) -> Sequence[Aim]:
    """The campaign with so many archives."""
    return campaign(argparse.Namespace(count=count, seed=0, archive=archive), folder)


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
