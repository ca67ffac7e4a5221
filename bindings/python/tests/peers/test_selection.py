"""The selection of the peers' cases holds what it promises: every pair of values, the same cases in every process."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import selection  # noqa: E402

SIZES = [[], [3], [2, 2], [2, 2, 3, 2, 2, 2, 12, 14], [12, 13, 2, 2, 2], [1, 5, 1], [7, 6, 5, 4, 3, 2]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_is_covered(sizes):
    rows = selection.pairwise_cover(sizes)
    assert rows == selection.pairwise_cover(sizes)
    assert len(set(rows)) == len(rows)
    for row in rows:
        assert len(row) == len(sizes) and all(0 <= i < size for i, size in zip(row, sizes, strict=False))
    for a, b in itertools.combinations(range(len(sizes)), 2):
        pairs = {(row[a], row[b]) for row in rows}
        assert len(pairs) == sizes[a] * sizes[b]
    # Near the least possible number, which the two largest groups give.
    if len(sizes) > 1:
        least = sorted(sizes)[-1] * sorted(sizes)[-2]
        assert len(rows) <= 1.5 * least + 2


def test_random_rows_are_new():
    rows = selection.pairwise_cover([3, 4, 5])
    more = selection.random_rows([3, 4, 5], 20, "seed", rows)
    assert len(more) == 20 and not set(more) & set(rows)
    assert more == selection.random_rows([3, 4, 5], 20, "seed", rows)
    assert more != selection.random_rows([3, 4, 5], 20, "another", rows)
    # No more than there are.
    assert len(selection.random_rows([3, 4, 5], 1000, "seed", rows)) == 60 - len(rows)


PEER = """
import os

import pytest
from flash_attn import flash_attn_func, flash_attn_varlen_func


@pytest.mark.parametrize("d", [32, 64, 65])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 2), (3, 4)])
def test_flash_attn_some(seqlen_q, seqlen_k, d):
    assert d != 64
    if d == 65 and seqlen_q == 3:
        os.abort()


def test_flash_attn_kvcache_some():
    with pytest.raises(RuntimeError, match="another message"):
        raise NotImplementedError("no cache")


def test_flash_attn_says_it_is_not_there():
    raise NotImplementedError("unexpected")
"""


def test_a_run(tmp_path):
    """A whole run over a made-up peer: selection, shards, a failure, a crash, skips and the table."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "tests" / "test_flash_attn.py").write_text(PEER)
    out = tmp_path / "out"
    command = [sys.executable, HERE / "run.py", "--flash-attn", tmp_path, "--processes", "2", "--out", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    #                                             possible, cases, passed, failed, skipped, not run
    assert rows["flash_attn:flash_attn_some"][:6] == ["6", "6", "3", "3", "0", "0"]
    assert rows["flash_attn:flash_attn_kvcache_some"][1:6] == ["1", "0", "0", "1", "0"]
    assert rows["flash_attn:flash_attn_says_it_is_not_there"][1:6] == ["1", "0", "1", "0", "0"]
    assert rows["all"] == ["8", "3", "4", "1", "0"]
    assert "process ended with -6" in done.stdout
    failed = (out / "flash-attn-failed.txt").read_text().split()
    assert len(failed) == 4 and "test_flash_attn.py::test_flash_attn_some[1-2-64]" in failed
    assert all(json.loads(line) for line in (out / "flash-attn.jsonl").read_text().splitlines())

    # The failed ones alone.
    command += ["--only", out / "flash-attn-failed.txt"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ, timeout=240)
    assert "flash-attn: 4 cases" in done.stdout, done.stdout + done.stderr
