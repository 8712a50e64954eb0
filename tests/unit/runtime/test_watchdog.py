"""One run on two hosts that torchrun has started: network namespaces joined by a cable, on one
machine.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from attrs import frozen
from fixtures.forked import COMMAND, TORCHRUN, ForkedCommand
from fixtures.toy_scheme import DEADLY

import bitpress
from bitpress.conformance.commands import install, plugins
from bitpress.conformance.models import files_of, write_model

# heartbeats after which a rank is taken for lost here
SOON = 3
SETTING = f"\nfrom bitpress.runtime import watchdog\nwatchdog.MAX_MISSED_HEARTBEATS = {SOON}\n"
WORDS = DEADLY.replace("os.kill(os.getpid(), int(number))", "os.system(number)") + SETTING
# The two hosts; the processes that become their commands join them.
HOSTS = """
set -e
mount --bind hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf
hostname one
ip link set lo up
unshare --net --uts sh -ec '
    hostname two
    ip link set lo up
    until ip link show two >/dev/null 2>&1; do sleep 0.05; done
    ip addr add 10.9.0.2/24 dev two
    ip link set two up
    touch ready
    sleep 1000
' &
two=$!
while [ "$(readlink /proc/$two/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add name one type veth peer name two netns $two
ip addr add 10.9.0.1/24 dev one
ip link set one up
wait
"""
# A fork becomes a process of a host, and then torchrun. Which process namespace is its own is
# settled when a process begins, so that it is a child that goes on.
JOIN = """
import ctypes, os, sys
libc, directory = ctypes.CDLL(None, use_errno=True), os.getcwd()
kinds, process = ("user", "mnt", "pid", "net", "uts"), sys.argv.pop(1)
for namespace in [os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind in kinds]:
    if libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")
os.chdir(directory)
if child := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
"""
APART = [
    "--user",
    "--map-root-user",
    "--net",
    "--uts",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
UNSHARE = ["unshare", *APART, "sh", "-ec"]
TRY = (
    "mount --bind /dev/null /etc/resolv.conf; ip link add name one type veth peer name two; "
    "unshare --net --uts true"
)


def permitted() -> bool:
    """Whether this user may make namespaces with networks of their own."""
    try:
        return subprocess.run([*UNSHARE, TRY], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not permitted(), reason="no network namespaces for this user")


def install_plugin(folder: Path) -> Path:
    return install(
        folder,
        "bitpress-scheme-toy",
        WORDS,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", shards=4)


@frozen
class End:
    """What torchrun ends with on a host (None: it was still waiting), standard output, and what is
    said by our own.
    """

    code: int | None
    out: str
    messages: list[str]


class TwoHosts:
    """A run with a rank on each of two hosts, into the folder's `out`."""

    def __init__(self, folder: Path, plugin: Path, model: Path) -> None:
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.9.0.1 one\n10.9.0.2 two\n")
        self._hosts = subprocess.Popen([*UNSHARE, HOSTS], cwd=folder)
        wait_until((folder / "ready").exists, 60)
        one = child_of(self._hosts.pid)
        words: list[object] = ["fork", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend"]
        words += ["c10d", "--rdzv-endpoint", "one:29500", *COMMAND, "compress", model]
        words += [folder / "out", "--scheme", "toy", "--threads", 1]
        self._running = {
            name: ForkedCommand(host, *words, path=plugin, setup=JOIN + TORCHRUN)
            for name, host in (("one", one), ("two", child_of(one)))
        }

    def is_over(self, name: str) -> bool:
        return self._running[name].returncode is not None

    def end(self) -> dict[str, End]:
        """End both hosts, with everything on them; what has become of each by then."""
        codes = {name: running.returncode for name, running in self._running.items()}
        self._hosts.kill()
        self._hosts.wait()
        result = {}
        for name, running in self._running.items():
            out, error = running.communicate(timeout=60)
            said = [line for line in error.splitlines() if line.startswith("bitpress: ")]
            result[name] = End(codes[name], out, said)
        return result


def ends(runs: Sequence[TwoHosts]) -> list[dict[str, End]]:
    """What becomes of each host; the second has ten seconds after the first."""
    wait_until(lambda: all(run.is_over("one") for run in runs), 300)
    wait_until(lambda: all(run.is_over("two") for run in runs), 10)
    return [run.end() for run in runs]


def child_of(process: int) -> int:
    """The first child of a process."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds, or for so long."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def test_two_hosts_write_the_bytes_of_one_process(tmp_path: Path, model: Path) -> None:
    plugin = install_plugin(tmp_path / "plugin")
    running = TwoHosts(tmp_path, plugin, model)
    with plugins(plugin):
        bitpress.compress(model, tmp_path / "alone", scheme="toy", threads=1)
    (completed,) = ends([running])
    assert [(end.code, end.messages) for end in completed.values()] == [(0, []), (0, [])]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    # one of them speaks
    assert [end.out for end in completed.values()].count("") == 1


DEATHS = {
    "killed": ("kill -KILL $PPID", {"one": "rank 1 (process", "two": None}),
    "stopped": ("kill -STOP $PPID", {"one": "rank 1 (process", "two": None}),
    "unplugged": (
        "ip link set $(hostname) down",
        {"one": "rank 1 (process", "two": "does not answer any more on the first machine"},
    ),
}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, dict[str, End]]:
    """What comes of each death. The runs wait for most of their time, so they run all at once."""
    runs = []
    for death, (order, _) in DEATHS.items():
        folder = tmp_path_factory.mktemp(death)
        plugin = install_plugin(folder / "plugin")
        # while all prove what they wrote
        (plugin / "die").write_text(f"restore|[ $(hostname) = two ] && {order}")
        runs.append(TwoHosts(folder, plugin, model))
    return dict(zip(DEATHS, ends(runs), strict=True))


@pytest.mark.parametrize("death", DEATHS)
def test_what_ends_a_host_s_rank_ends_the_run_and_is_told_on_the_other(
    deaths: dict[str, dict[str, End]], death: str
) -> None:
    _, expected = DEATHS[death]
    completed = deaths[death]
    assert completed["one"].code not in (0, None)
    assert completed["two"].code != 0
    for host, words in expected.items():
        assert len(completed[host].messages) == (words is not None), completed
        assert words is None or words in completed[host].messages[0]
