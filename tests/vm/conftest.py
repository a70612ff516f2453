# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the tests of `guest/` where they belong, and report them on the host as if they had run there.

They are collected on the host as any test; the first one whose turn comes boots its kernel and runs all of that kernel in
it. The guest's reports travel as lines of JSON in `/run/vm`, serialised by pytest's own hooks (as pytest-xdist does). In
the guest this module only writes them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.vm.errors import VmError
from tests.vm.kernels import OWN_VARIABLE
from tests.vm.machine import DIED, TIMED_OUT, Guest, Machine
from tests.vm.selection import guest_kernel, inner_pytest

HERE = Path(__file__).parent
REPORTS_VARIABLE = "BLKSNAP_VM_REPORTS"
STARTED = "started"
collect_ignore = [] if os.environ.get(OWN_VARIABLE) else ["test_blkfilter.py"]
# Of one boot: what it may take at all, and for each test in it. A test that hangs is ended in the guest before that.
BOOT_LIMIT_S = 600
TEST_LIMIT_S = 60
LONG_TEST_LIMIT_S = 600


def pytest_configure(config: pytest.Config) -> None:
    """In a guest the one plugin, on the host the other."""
    if guest_kernel() is None:
        config.pluginmanager.register(_Host(config))
    elif path := os.environ.get(REPORTS_VARIABLE):
        config.pluginmanager.register(_InGuest(config, Path(path)))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A guest starts no guests."""
    outside = collection_path.is_file() and not collection_path.is_relative_to(HERE / "guest")
    return True if guest_kernel() is not None and outside else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `vm`, and has the harness's time limit in place of the project's for a test."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.vm)
            if guest_kernel() is None:
                item.add_marker(pytest.mark.timeout(0), append=False)


class _InGuest:
    """Writes every report as it is made: what was written when the guest dies is still known."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({STARTED: nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def _write(self, data: object) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(data) + "\n")


class _Host:
    """Puts a boot in the place of a guest test's run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._reports: dict[str, list[pytest.TestReport]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """The reports of the guest, once for each item of it; None for every other item."""
        if not _is_guest_item(item):
            return None
        if item.nodeid not in self._reports:
            self._boot(item)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports[item.nodeid]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _boot(self, first: pytest.Item) -> None:
        """Reports of `first`, and of as many others of its kernel as the guest lived for."""
        kernel = _kernel(first)
        items = {
            item.nodeid: item
            for item in first.session.items
            if _is_guest_item(item) and _kernel(item) == kernel and item.nodeid not in self._reports
        }
        limit_s = BOOT_LIMIT_S + sum(
            LONG_TEST_LIMIT_S if item.get_closest_marker("long") else TEST_LIMIT_S for item in items.values()
        )
        try:
            why, reports = self._run(kernel, list(items), limit_s)
        except VmError as error:
            why, reports = str(error), {}
        if not reports:
            # No guest, or none that came as far as a test: another boot would take long to say the same.
            self._reports |= {nodeid: [_failure(item, why)] for nodeid, item in items.items()}
            return
        finished = {nodeid: made for nodeid, made in reports.items() if made and made[-1].when == "teardown"}
        self._reports |= finished
        if finished.keys() != items.keys():
            # The test that was running is to blame, or the last that ran. The others get a guest of their own, later.
            culprit = next((nodeid for nodeid in reports if nodeid not in finished), next(reversed(reports)))
            self._reports[culprit] = [*reports[culprit], _failure(items[culprit], why)]
            self._reports.setdefault(first.nodeid, [_failure(first, why)])

    def _run(
        self, kernel: str, nodeids: Sequence[str], limit_s: float
    ) -> tuple[str, dict[str, list[pytest.TestReport]]]:
        """What to say of tests without a report, and the reports by node id in the order in which the tests began.

        A guest that dies before it came as far as a test has died of something else; once it is given another life.
        """
        status, why, reports = self._run_once(kernel, nodeids, limit_s)
        if status == DIED and not reports:
            _, why_again, reports = self._run_once(kernel, nodeids, limit_s)
            why = f"{why}\n--- and once more:\n{why_again}"
        return why, reports

    def _run_once(
        self, kernel: str, nodeids: Sequence[str], limit_s: float
    ) -> tuple[int, str, dict[str, list[pytest.TestReport]]]:
        command = inner_pytest(["-q", "--no-header", "--no-summary", "-m", "vm", "@/run/vm/tests"])
        machine = Machine(kernel, time_limit_s=limit_s)
        guest = Guest(machine, command, {REPORTS_VARIABLE: "/run/vm/reports"})
        (guest.directory / "tests").write_text("".join(f"{nodeid}\n" for nodeid in nodeids))
        with guest:
            output = list(guest.output)
            status = guest.wait()
            console = guest.console.read_text(errors="replace").splitlines()
            written = guest.directory / "reports"
            lines = written.read_text().splitlines() if written.exists() else []
        reports: dict[str, list[pytest.TestReport]] = {}
        for line in lines:
            data = json.loads(line)
            if STARTED in data:
                reports[data[STARTED]] = []
                continue
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            if isinstance(report.longrepr, list):
                # Where and why of a skip; JSON knows no tuples.
                report.longrepr = tuple(report.longrepr)
            if report.failed:
                report.sections.append(("Guest", f"console and output kept in {guest.directory}"))
            reports[report.nodeid].append(report)
        if status:
            (guest.directory / "output").write_text("\n".join(output))
        reason = {DIED: "the guest died", TIMED_OUT: "the time limit ended the guest"}.get(
            status, "no report came"
        )
        tail = "\n".join((*output[-40:], "--- console:", *console[-100:]))
        return status, f"{reason} (status {status}, kept {guest.directory})\n{tail}", reports


def _is_guest_item(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE / "guest")


def _kernel(item: pytest.Item) -> str:
    """The parameter of the fixture `kernel`."""
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["kernel"])


def _failure(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=text,
        when="call",
    )
