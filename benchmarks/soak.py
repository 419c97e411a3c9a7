"""Half an hour of good requests, cancels, callers who leave, deadlines and bad requests: what grows, what stays.

`python -m benchmarks.soak --minutes 30`; it ends earlier, after 2000 requests. They come in rounds of 100. After each,
the server must be idle within a second and give the right audio; then its processes and files are looked at.
"""

import argparse
import asyncio
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import ProcessLook, board_entries, files_of, look_at
from benchmarks.prometheus import ROWS, read_metrics, until_zero
from benchmarks.report import Plot, Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint
from benchmarks.server_process import Address, ServerProcess
from benchmarks.soak_callers import SoakCallers
from benchmarks.soak_plan import Seen, draw_actions
from benchmarks.wire import LEFT, PROTOCOLS, TIMED_OUT

REQUESTS = 2000
PER_ROUND = 100
WARM_UP_ROUNDS = 12
"""What each process keeps from its first requests is there then: the plot shows it. The UNet's takes longest, whose
allocator keeps blocks for each size of forward."""
SETTLE_S = 1.0
"""After the last caller, before a look."""
LOG_TIMEOUT_S = 5.0
BOARD_TIMEOUT_S = 90.0
"""An entry of the job board is kept for a minute, and swept within ten seconds after it."""
REQUESTS_TOTAL = "audioldm2_requests_total"


@dataclass
class Round:
    """What was seen after some requests.

    Attributes:
        requests: How many had been sent by then.
        rows_free_s: From the last caller's leaving until nothing was denoised, by the metrics.
        idle_s: From the last caller's leaving until nothing was live.
        live: Requests that the job board took for live a second after that.
        looks: Processes.
        files: In the server's private folders and shared memory.
    """

    requests: int
    rows_free_s: float
    idle_s: float
    live: list[str]
    looks: dict[str, ProcessLook]
    files: set[Path]


@dataclass
class Soak:
    """What a soak has shown.

    Attributes:
        prefix: Of all requests' ids.
        seen: What the callers saw.
        rounds: After how many requests, what was seen.
        audio: All that the same good request was ever answered with.
        logged: Reasons of each request, by its id, from the server's log.
        counted: What the server's metrics have counted, by reason.
        board_entries: What was left on the job board in the end; None where nobody waited for it.
    """

    prefix: str
    seen: list[Seen] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    audio: set[bytes] = field(default_factory=set)
    logged: dict[str, list[str]] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)
    board_entries: int | None = None

    @property
    def problems(self) -> list[str]:
        """Requests whose callers were told what the server says otherwise, or what must not be."""
        problems = (seen.problem(self.logged.get(seen.action.request.request_id, [])) for seen in self.seen)
        return [problem for problem in problems if problem]

    @property
    def miscounted(self) -> Counter[str]:
        """How many requests the metrics have more than the log, by reason, or less."""
        lines = Counter(reason for reasons in self.logged.values() for reason in reasons)
        difference = Counter(self.counted)
        difference.subtract(lines)
        return Counter({reason: count for reason, count in difference.items() if count})

    @property
    def new_files(self) -> set[Path]:
        """Files that were there in the end and not after the first round."""
        return self.rounds[-1].files - self.rounds[0].files

    def growth(self, since: int) -> dict[str, float]:
        """Return the memory of each process in the end, of that after round number `since`."""
        before, after = self.rounds[since].looks, self.rounds[-1].looks
        return {name: after[name].pss_mib / look.pss_mib for name, look in before.items() if name in after}


class Soaker:
    """Runs a soak against a server.

    Args:
        address: Where it is.
        read_log: Returns a line for each request.
        seed: Of what is drawn.
    """

    def __init__(self, address: Address, read_log: Callable[[], str], seed: int) -> None:
        self._address, self._read_log, self._seed = address, read_log, seed
        self.soak = Soak(f"soak-{time.monotonic_ns()}")

    async def run(self, num_rounds: int, per_round: int, seconds: float, *, wait_for_board: bool = False) -> Soak:
        """Do rounds until they are done or the time is up."""
        soak, end = self.soak, time.monotonic() + seconds
        async with SoakCallers(self._address) as callers:
            soak.audio |= await callers.reference(f"before-{soak.prefix}")
            await self._until_counted()
            before = self._count()
            for number in range(num_rounds):
                await self._run_round(callers, number, per_round)
                if time.monotonic() >= end:
                    break
        await self._read_accounts(before)
        if wait_for_board:
            soak.board_entries = await self._until_board_is_empty()
        return soak

    async def _run_round(self, callers: SoakCallers, number: int, per_round: int) -> None:
        soak = self.soak
        seen = await callers.run(draw_actions(self._seed + number, per_round, soak.prefix))
        rows_free_s = await until_zero(self._address.metrics, ROWS)
        idle_s = rows_free_s + await until_zero(self._address.metrics)
        await asyncio.sleep(max(0.0, SETTLE_S - idle_s))
        live = await callers.live(one.action.request.request_id for one in seen)
        soak.audio |= await callers.reference(f"{soak.prefix}-{number}")
        await until_zero(self._address.metrics)
        soak.seen += seen
        pid = self._address.pid
        soak.rounds.append(Round(len(soak.seen), rows_free_s, idle_s, live, look_at(pid), set(files_of(pid))))

    async def _until_counted(self) -> None:
        """Wait until the references are logged: what ended earlier is logged, and the metrics follow at once."""
        lines = re.compile(rf"\brequest id=before-{self.soak.prefix}-")
        async with asyncio.timeout(LOG_TIMEOUT_S):
            while len(lines.findall(self._read_log())) < len(PROTOCOLS):
                await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE_S)

    async def _read_accounts(self, before: Counter[str]) -> None:
        """Read log and metrics, which come within half a second of one another, until they account for all."""
        soak, end = self.soak, time.monotonic() + LOG_TIMEOUT_S
        # The stages' lines: the front's, which say by which protocol a request came, tell of the same requests.
        pattern = re.compile(rf"\brequest id=({soak.prefix}-\S+) (?!.*\bprotocol=).*\breason=(\w+)")
        while True:
            soak.logged = {}
            for request_id, reason in pattern.findall(self._read_log()):
                soak.logged.setdefault(request_id, []).append(reason)
            soak.counted = self._count()
            soak.counted.subtract(before)
            if not (soak.problems or soak.miscounted) or time.monotonic() >= end:
                return
            await asyncio.sleep(0.1)

    def _count(self) -> Counter[str]:
        return read_metrics(self._address.metrics).by(REQUESTS_TOTAL, "reason")

    async def _until_board_is_empty(self) -> int:
        end = time.monotonic() + BOARD_TIMEOUT_S
        while (entries := board_entries(self._address.pid)) and time.monotonic() < end:
            await asyncio.sleep(1)
        return entries


def tabulate_outcomes(report: Report, soak: Soak) -> None:
    """Add what callers did, were told, and what the server counted."""
    pairs = Counter(
        (one.action.deed.value, one.outcome, *soak.logged.get(one.action.request.request_id, ["nothing"]))
        for one in soak.seen
    )
    report.add(
        Table(
            f"{len(soak.seen)} requests",
            ("the caller", "was told, or did", "the server logged", "n"),
            tuple((*cells[:3], str(count)) for cells, count in sorted(pairs.items())),
            note=f"Not accounted for: {len(soak.problems)}. Metrics and log differ by {sum(soak.miscounted.values())}. "
            f"`{LEFT}` and `{TIMED_OUT}` are callers who closed the connection, or gave the call up.",
        )
    )
    report.measurements["not accounted for"] = soak.problems
    report.measurements["metrics beyond log lines"] = dict(soak.miscounted)
    report.measurements["outcomes"] = [[*cells, count] for cells, count in sorted(pairs.items())]


def tabulate_processes(report: Report, soak: Soak, since: int) -> None:
    """Add memory, files and threads."""
    first, last = soak.rounds[since], soak.rounds[-1]
    growth = soak.growth(since)
    report.add(
        Table(
            "Processes",
            ("process", "memory", "in the end", "ratio", "resident", "open files", "threads"),
            tuple(
                (
                    name,
                    f"{first.looks[name].pss_mib:.1f} MiB",
                    f"{last.looks[name].pss_mib:.1f} MiB",
                    f"{ratio:.3f}",
                    f"{first.looks[name].rss_mib:.0f} to {last.looks[name].rss_mib:.0f} MiB",
                    f"{first.looks[name].files} to {last.looks[name].files}",
                    f"{first.looks[name].threads} to {last.looks[name].threads}",
                )
                for name, ratio in growth.items()
            ),
            note=f"After {first.requests} requests, and after {last.requests}; nothing was live then. Memory is the "
            "kernel's proportional set size: what processes share is divided among them.",
        )
    )
    report.measurements["memory ratios"] = growth
    report.measurements["memory by round, in MiB"] = {
        name: [round(one.looks[name].pss_mib, 1) for one in soak.rounds if name in one.looks] for name in last.looks
    }
    names = list(last.looks)
    report.plots.append(
        Plot(
            "Memory during the soak",
            "requests so far",
            "of that in the end",
            {name: _curve(soak.rounds, name) for name in names},
        )
    )


def _curve(rounds: Sequence[Round], name: str) -> list[tuple[float, float]]:
    end = rounds[-1].looks[name].pss_mib
    return [(one.requests, one.looks[name].pss_mib / end) for one in rounds if name in one.looks]


def tabulate_rest(report: Report, soak: Soak) -> None:
    """Add what was left."""
    rows_free = Samples(tuple(one.rows_free_s for one in soak.rounds), "s")
    idle = Samples(tuple(one.idle_s for one in soak.rounds), "s")
    report.add(
        Table(
            "What is left",
            ("", ""),
            (
                ("from the last caller until no row was denoised, each round", str(rows_free)),
                ("from the last caller until nothing was live", str(idle)),
                (
                    "live by the job board a second after that",
                    str(sum(len(one.live) for one in soak.rounds)),
                ),
                ("files, sockets and shared memory that weren't there after the first round", str(len(soak.new_files))),
                ("entries of the job board, a minute and a half later", str(soak.board_entries)),
                ("different audio of the same request", str(len(soak.audio))),
            ),
        )
    )
    report.measurements |= {
        "no row is denoised after, in s": [one.rows_free_s for one in soak.rounds],
        "idle after, in s": [one.idle_s for one in soak.rounds],
        "new files": sorted(map(str, soak.new_files)),
        "job board entries": soak.board_entries,
        "different audio of the same request": len(soak.audio),
    }


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="at most")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="at most")
    parser.add_argument("--per-round", type=int, default=PER_ROUND)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repository", type=Path, help="an export that is there already")
    parser.add_argument("--dry-run", action="store_true", help="write no report")
    arguments = parser.parse_args()
    report = Report("soak", "Soak, demo size", f"python -m benchmarks.soak --minutes {arguments.minutes:g}")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        repository = arguments.repository or export_new_checkpoint(Path(folder))
        with ServerProcess(repository, Path(folder)) as server:
            soaker = Soaker(server.address, server.request_lines, arguments.seed)
            num_rounds = max(2, arguments.requests // arguments.per_round)
            soak = asyncio.run(soaker.run(num_rounds, arguments.per_round, arguments.minutes * 60, wait_for_board=True))
    tabulate_outcomes(report, soak)
    tabulate_processes(report, soak, min(WARM_UP_ROUNDS, len(soak.rounds) // 2) - 1)
    tabulate_rest(report, soak)
    for problem in soak.problems:
        print(problem)
    if not arguments.dry_run:
        report.save()


if __name__ == "__main__":
    main()
