"""pytest plugin that runs a peer's test files over ferroflash, their assertions and tolerances untouched.

It selects cases before pytest generates them, deals them out to several processes, seeds each case the same in every
order, turns `NotImplementedError` into a skip, and writes one line of JSON per case. `run.py` starts it.
"""

import gc
import math
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import alias  # noqa: E402
import features  # noqa: E402
import record  # noqa: E402
import selection  # noqa: E402

# Exit status of a process whose CUDA context is lost. The runner starts another for the cases that are left.
CONTEXT_LOST = 77

# Bytes that torch's allocator may keep between cases. Processes share one GPU.
CACHE_LIMIT = 6 << 30


def pytest_addoption(parser):
    group = parser.getgroup("peers")
    group.addoption("--peer", choices=["flag-attn", "flash-attn"], help="whose tests these are")
    group.addoption("--checkout", help="root of the peer's source tree")
    group.addoption("--own", action="store_true", help="run over the peer's own kernels instead of ferroflash's")
    group.addoption(
        "--select-random", type=int, help="a pairwise cover of the parameters, and this many random cases per test"
    )
    group.addoption("--selection-seed", type=int, default=0, help="seed of the random cases")
    group.addoption("--only", help="file with names of cases, one per line: run no others")
    group.addoption("--shard", default="0/1", help="i/n: every n-th case in shuffled order, from the i-th on")
    group.addoption("--record", help="file to which outcomes are appended; cases that it already has are not run")
    group.addoption("--until", type=float, help="Unix time after which no case is started")


def pytest_configure(config):
    if config.getoption("peer"):
        alias.install(config.getoption("peer"), config.getoption("checkout"), config.getoption("own"))
        config.pluginmanager.register(Peers(config), "peers")


class Peers:
    """The hooks. They are registered only if a peer is named."""

    def __init__(self, config):
        self.config = config
        self.peer = config.getoption("peer")
        self.selects = self.peer == "flash-attn" and config.getoption("select_random") is not None
        self.record_file = config.getoption("record")
        self.possible = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        """Replaces a test's `parametrize` marks by one with the selected rows. Names stay as pytest makes them."""
        marks = list(metafunc.definition.iter_markers("parametrize"))
        if not self.selects or not marks:
            return
        groups = [Group(*mark.args[:2]) for mark in marks]
        function = metafunc.function.__name__
        rows, self.possible[function] = select(function, groups, self.config)
        metafunc.definition.own_markers[:] = [m for m in metafunc.definition.own_markers if m.name != "parametrize"]
        names = [name for group in groups for name in group.names]
        values = [sum((groups[g].values[i] for g, i in enumerate(row)), ()) for row in rows]
        ids = ["-".join(groups[g].ids[i] for g, i in enumerate(row)) for row in rows]
        metafunc.parametrize(names, values, ids=ids)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        keep = items[:]
        if only := self.config.getoption("only"):
            wanted = set(Path(only).read_text().split("\n"))
            keep = [item for item in keep if case(item.nodeid) in wanted]
        random.Random(0).shuffle(keep)
        shard, shards = map(int, self.config.getoption("shard").split("/"))
        keep = keep[shard::shards]
        for item in keep:
            self.record(case=case(item.nodeid), outcome="collected", possible=self.possible.get(item.originalname))
        done = {
            line["case"] for line in record.read(self.record_file) if line["outcome"] not in ("collected", "started")
        }
        items[:] = [item for item in keep if case(item.nodeid) not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        until = self.config.getoption("until")
        if until is not None and time.time() > until:
            item.session.shouldstop = "time limit"
            return True
        # Some of the peers' tests seed once per file. With a seed per case, a case has the same data in every order.
        torch.random.manual_seed(10086)
        self.record(case=case(item.nodeid), outcome="started")
        try:
            return (yield)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            if torch.cuda.is_available() and torch.cuda.memory_reserved() > CACHE_LIMIT:
                gc.collect()
                torch.cuda.empty_cache()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        missing = report.when == "call" and report.failed and self.may_be_missing(item)
        if missing and (missing := not_implemented(call.excinfo.value)):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"NotImplementedError: {missing}")
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext if report.failed else ""
            first = ""
            if report.skipped:
                first = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            elif call.excinfo is not None:
                first = call.excinfo.exconly()
            self.record(
                case=case(item.nodeid),
                outcome=report.outcome,
                seconds=round(call.duration, 3),
                first=first,
                text=text[-3000:],
            )
            if "CUDA error" in first or "CUDA_ERROR" in first:
                os._exit(CONTEXT_LOST)
        return report

    def may_be_missing(self, item):
        """Returns whether a case needs a feature that ferroflash lacks. torch's copy of a peer may lack any."""
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return (
            self.config.getoption("own")
            or features.missing_function(self.peer, item.originalname)
            or any(features.missing_value(self.peer, name, value) for name, value in parameters.items())
        )

    def record(self, **line):
        if self.record_file:
            record.append(self.record_file, line)


class Group:
    """Parameters of one `parametrize` mark: names, tuples of values, and pytest's names for them."""

    def __init__(self, names, values):
        self.names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        self.values = [tuple(value) if len(self.names) > 1 else (value,) for value in values]
        self.ids = [
            "-".join(name_of(n, v, at) for n, v in zip(self.names, value, strict=False))
            for at, value in enumerate(self.values)
        ]

    def missing(self, peer, at):
        """Returns whether a value needs a feature that ferroflash lacks."""
        return any(features.missing_value(peer, n, v) for n, v in zip(self.names, self.values[at], strict=False))


def select(function, groups, config):
    """Returns rows of indices into the groups, and the number of rows that can be run today."""
    peer = config.getoption("peer")
    missing = [[at for at in range(len(group.values)) if group.missing(peer, at)] for group in groups]
    allowed = [[at for at in range(len(group.values)) if at not in missing[g]] for g, group in enumerate(groups)]
    if features.missing_function(peer, function):
        return [tuple(indices[0] for indices in allowed)], 0
    sizes = [len(indices) for indices in allowed]
    rows = selection.pairwise_cover(sizes)
    seed = f"{config.getoption('selection_seed')} {function}"
    rows += selection.random_rows(sizes, config.getoption("select_random"), seed, rows)
    rows = [tuple(allowed[g][i] for g, i in enumerate(row)) for row in rows]
    # One case of each missing feature, which has to say so.
    for g, indices in enumerate(missing):
        rows += [tuple(at if g == other else allowed[other][0] for other in range(len(groups))) for at in indices[:1]]
    return rows, math.prod(sizes)


def not_implemented(error):
    """Returns the NotImplementedError from which an exception comes. `pytest.raises(RuntimeError)` can hide it."""
    while error is not None and not isinstance(error, NotImplementedError):
        error = error.__context__
    return error


def name_of(name, value, at):
    """Returns pytest's name of a parameter's value: the value itself if it is a simple one, otherwise by position."""
    if value is None or isinstance(value, (str, int, float, bool, complex)):
        return str(value)
    return getattr(value, "__name__", None) or f"{name}{at}"


def case(nodeid):
    """Returns a case's name without the path of its file."""
    return nodeid.rsplit("/", 1)[-1]
