"""The plan of a start: which archives, with how many processes and threads, and in which versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from traceserve.archives.archive import pack_archive
from traceserve.errors import ServerError
from traceserve.serving.plan import planned
from traceserve_runtime import processor


@pytest.mark.parametrize(("workers", "threads"), [(None, None), (1, None), (3, 2), (8, 1)])
def test_several_workers_share_the_cores(
    workers: int, threads: int, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has set the threads."""
    monkeypatch.setattr(processor, "cores", lambda: 7)
    for variable, expected in ((None, threads), ("4", None)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        [found] = planned([mar], None, workers, False).values()
        assert found.serving.threads == expected and found.workers == (workers or 1)
        assert found.changed is (workers is not None)


def test_two_archives_at_one_address_are_refused(mar: Path, artifact: Path, tmp_path: Path) -> None:
    """Several versions of a name have addresses of their own where the engine knows them."""
    newer = pack_archive(artifact, "tiny", tmp_path, version="2.0")
    assert list(planned([mar, newer], None, None, True)) == ["tiny", "tiny-2.0"]
    with pytest.raises(ServerError, match="would both answer at /predictions/tiny$"):
        planned([mar, newer], None, None, False)
    with pytest.raises(ServerError, match="would both answer at /predictions/tiny, both as version 1.0$"):
        planned([mar, mar], None, None, True)
    with pytest.raises(ServerError, match="would both answer at /predictions/tiny, both as version 2.0$"):
        planned([mar, newer, newer], None, None, True)


def test_each_archive_has_a_share(mar: Path, artifact: Path, tmp_path: Path) -> None:
    files = [mar, pack_archive(artifact, "tiny", tmp_path, version="2.0")]
    assert [each.share for each in planned(files, None, None, True).values()] == [1.0, 1.0]
    assert [each.share for each in planned(files, None, None, True, [9, 1]).values()] == [9, 1]
    with pytest.raises(ServerError, match="--shares has 1 numbers for 2 archives; give one for each"):
        planned(files, None, None, True, [9])
