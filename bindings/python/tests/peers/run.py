"""Runs the peers' own tests over ferroflash: FlagAttention's `tests/` and flash-attention's `tests/test_flash_attn.py`.

    python run.py --flag-attn DIR --flash-attn DIR [--processes 8] [--seconds 200] [--out DIR]

Their assertions and tolerances stay as they are; `plugin.py` says what is put in place of what. It needs a GPU, pytest,
einops and Triton, and ferroflash importable. FlagAttention runs as a whole. Of flash-attention's several 100,000 cases
those whose features exist are run in a selection: per test every pair of parameter values, and `--random` further ones.

Several processes share the GPU. Outcomes are in `OUT/<peer>.jsonl`, failures in `OUT/<peer>-failures.txt`, their names
in `OUT/<peer>-failed.txt`; a table is printed last. `--own --only OUT/<peer>-failed.txt` runs failed cases over the
peer's own kernels, which shows whether the failure is the peer's, too.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import record as records_of

HERE = Path(__file__).resolve().parent
PEERS = {"flag-attn": "tests/flag_attn", "flash-attn": "tests/test_flash_attn.py"}
CONTEXT_LOST = 77


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="DIR", help=f"checkout of {peer}")
    parser.add_argument("--processes", type=int, default=8, help="number of processes that share the GPU")
    parser.add_argument("--seconds", type=float, default=300, help="time limit for each peer")
    parser.add_argument("--random", type=int, default=40, help="random cases per test of flash-attention")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases")
    parser.add_argument("--out", type=Path, default=Path("peers-out"), help="folder for logs")
    parser.add_argument("--own", action="store_true", help="run over the peer's own kernels")
    parser.add_argument("--only", help="file with names of cases, one per line")
    parser.add_argument("--select", metavar="EXPRESSION", help="as pytest's -k")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for peer in PEERS:
        if checkout := getattr(args, peer.replace("-", "_")):
            record, seconds = run(peer, Path(checkout).resolve(), args)
            failed |= report(peer, record, seconds, args)
    sys.exit(failed)


def run(peer, checkout, args):
    """Runs one peer's tests. Returns the merged record and the time taken."""
    start = time.time()
    until = start + args.seconds
    name = peer + ("-own" if args.own else "")
    records = [args.out / f".{name}-{shard}.jsonl" for shard in range(args.processes)]
    logs = [args.out / f".{name}-{shard}.log" for shard in range(args.processes)]
    for path in records + logs:
        path.unlink(missing_ok=True)

    def launch(shard):
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-c", os.devnull]
        command += ["--rootdir", checkout, "--import-mode=importlib", "-q", "--tb=short", "--no-header", "-rN"]
        command += ["--peer", peer, "--checkout", checkout, "--record", records[shard], "--until", str(until)]
        command += ["--select-random", str(args.random), "--selection-seed", str(args.seed)]
        command += ["--shard", f"{shard}/{args.processes}", *(["--own"] if args.own else [])]
        command += ["--only", os.path.abspath(args.only)] if args.only else []
        command += ["-k", args.select] if args.select else []
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        with open(logs[shard], "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*map(str, command), str(checkout / PEERS[peer])],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            )

    running = {shard: launch(shard) for shard in range(args.processes)}
    while running:
        time.sleep(0.2)
        for shard, process in list(running.items()):
            late = time.time() > until + 60
            if late:
                process.kill()
            if process.poll() is None:
                continue
            del running[shard]
            # A process that was lost in a case is started again for the cases that are left.
            if not late and lost_in(records[shard], process.returncode):
                running[shard] = launch(shard)

    merged = [line for record in records for line in records_of.read(record)]
    (args.out / f"{name}.jsonl").unlink(missing_ok=True)
    records_of.append(args.out / f"{name}.jsonl", *merged)
    if not merged:
        print(logs[0].read_text(encoding="utf-8")[-3000:])
    else:
        for path in records + logs:
            path.unlink(missing_ok=True)
    return merged, time.time() - start


def lost_in(record, status):
    """Returns whether a process ended within a case; then records that as a failure, unless the case did."""
    lines = records_of.read(record)
    if status in (0, 1, 2, 5) or not lines:
        return False
    if lines[-1]["outcome"] == "started":
        line = {"case": lines[-1]["case"], "outcome": "failed", "seconds": 0, "first": f"process ended with {status}"}
        records_of.append(record, line)
        return True
    return status == CONTEXT_LOST


def report(peer, lines, seconds, args):
    """Prints the table, writes the failures' texts and names. Returns whether anything failed or was not run."""
    name = peer + ("-own" if args.own else "")
    collected = {line["case"]: line for line in lines if line["outcome"] == "collected"}
    outcomes, spent = {}, defaultdict(float)
    for line in lines:
        if line["outcome"] in ("passed", "failed", "skipped"):
            spent[function(line["case"])] += line["seconds"]
            # A case can be reported twice, by its call and its teardown: a failure stays one.
            if line["case"] not in outcomes or line["outcome"] == "failed":
                outcomes[line["case"]] = line
    failures = [line for line in outcomes.values() if line["outcome"] == "failed"]
    with open(args.out / f"{name}-failures.txt", "w", encoding="utf-8") as file:
        for line in failures:
            file.write(f"==== {line['case']}\n{line.get('text') or line['first']}\n")
    (args.out / f"{name}-failed.txt").write_text("".join(f"{line['case']}\n" for line in failures), encoding="utf-8")

    print(f"\n{name}: {len(collected)} cases, {seconds:.0f} s, {args.processes} processes")
    print(
        f"{'test':56} {'possible':>9} {'cases':>6} {'passed':>6} {'failed':>6} {'skipped':>7} {'not run':>7} {'s':>6}"
    )
    total = Counter()
    for test in sorted({function(case) for case in collected}):
        cases = [case for case in collected if function(case) == test]
        count = Counter(outcomes[case]["outcome"] if case in outcomes else "not run" for case in cases)
        total += count
        possible = collected[cases[0]].get("possible")
        numbers = (
            f"{count['passed']:6} {count['failed']:6} {count['skipped']:7} {count['not run']:7} {spent[test]:6.0f}"
        )
        print(f"{short(test):56} {len(cases) if possible is None else possible:9} {len(cases):6} {numbers}")
    print(f"{'all':66} {sum(total.values()):6} {total['passed']:6} {total['failed']:6} {total['skipped']:7} "
          f"{total['not run']:7}")  # fmt: skip

    reasons = Counter(
        (short(function(c)), line["first"]) for c, line in outcomes.items() if line["outcome"] == "skipped"
    )
    for (test, reason), count in sorted(reasons.items()):
        print(f"skipped {count:4} {test}: {reason.splitlines()[0][:110] if reason else ''}")
    shown = Counter()
    for line in sorted(failures, key=lambda line: line["case"]):
        test = function(line["case"])
        shown[test] += 1
        if shown[test] <= 3:
            print(f"FAILED {line['case']}: {' '.join(line['first'].split())[:150]}")
    return bool(failures) or total["not run"] > 0 or not collected


def function(case):
    """Returns a case's file and function, without its parameters."""
    return case.split("[")[0]


def short(test):
    return test.replace(".py::test_", ":").removeprefix("test_")


if __name__ == "__main__":
    main()
