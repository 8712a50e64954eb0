"""One run on two hosts that torchrun has started: network namespaces joined by a cable, on one
machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from attrs import frozen
from fixtures.forked import TORCHRUN
from fixtures.toy_scheme import DEADLY

import bitpress
from bitpress.conformance.commands import install, plugins
from bitpress.conformance.models import files_of, write_model

# heartbeats after which a rank is taken for lost here
SOON = 3
SETTING = f"\nfrom bitpress.runtime import watchdog\nwatchdog.MAX_MISSED_HEARTBEATS = {SOON}\n"
WORDS = DEADLY.replace("os.kill(os.getpid(), int(number))", "os.system(number)") + SETTING
HOSTS = """
set -e
mount --bind hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf
hostname one
ip link set lo up
unshare --net --uts sh -c '
    hostname two
    ip link set lo up
    until ip link show two >/dev/null 2>&1; do sleep 0.05; done
    ip addr add 10.9.0.2/24 dev two
    ip link set two up
    "$@" >two.out 2>two.err && echo 0 >two.code || echo $? >two.code
    sleep 1000  # its end of the cable stays
' two "$@" &
two=$!
while [ "$(readlink /proc/$two/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add name one type veth peer name two netns $two
ip addr add 10.9.0.1/24 dev one
ip link set one up
"$@" >one.out 2>one.err && echo 0 >one.code || echo $? >one.code
# then everything ends with this shell
for i in $(seq 100); do [ -e two.code ] && break; sleep 0.1; done
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

    @classmethod
    def of(cls, host: str, folder: Path) -> End:
        code = folder / f"{host}.code"
        messages = [
            line
            for line in (folder / f"{host}.err").read_text().splitlines()
            if line.startswith("bitpress: ")
        ]
        return cls(
            int(code.read_text()) if code.exists() else None,
            (folder / f"{host}.out").read_text(),
            messages,
        )


def start_on_two_hosts(folder: Path, plugin: Path, model: Path) -> subprocess.Popen[bytes]:
    """Compress into the folder's `out`, with a rank on each host."""
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.9.0.1 one\n10.9.0.2 two\n")
    torchrun = [sys.executable, "-c", TORCHRUN, "fork", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "one:29500", "-m", "bitpress"]
    command = ["compress", str(model), "out", "--scheme", "toy", "--threads", "1"]
    path = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*UNSHARE, HOSTS, "one", *torchrun, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
    )


def ends(running: subprocess.Popen[bytes], folder: Path) -> dict[str, End]:
    """What became of each host."""
    assert running.wait(timeout=300) == 0
    return {host: End.of(host, folder) for host in ("one", "two")}


def test_two_hosts_write_the_bytes_of_one_process(tmp_path: Path, model: Path) -> None:
    plugin = install_plugin(tmp_path / "plugin")
    running = start_on_two_hosts(tmp_path, plugin, model)
    with plugins(plugin):
        bitpress.compress(model, tmp_path / "alone", scheme="toy", threads=1)
    completed = ends(running, tmp_path)
    assert [(end.code, end.messages) for end in completed.values()] == [(0, []), (0, [])]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    # one of them speaks
    assert [end.out for end in completed.values()].count("") == 1


DEATHS = {
    "killed": ("kill -KILL $PPID", {"one": "rank 1 (process", "two": None}),
    "stopped": ("kill -STOP $PPID", {"one": "rank 1 (process", "two": None}),
    "unplugged": (
        "ip link set $(hostname) down",
        {"one": "rank 1 (process", "two": "torchrun on the first machine"},
    ),
}


@pytest.fixture(scope="module")
def deaths(
    tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Mapping[str, tuple[subprocess.Popen[bytes], Path]]:
    """A run for each death, and its folder: they wait for most of their time, so all at once."""
    runs = {}
    for death, (order, _) in DEATHS.items():
        folder = tmp_path_factory.mktemp(death)
        plugin = install_plugin(folder / "plugin")
        # while all prove what they wrote
        (plugin / "die").write_text(f"restore|[ $(hostname) = two ] && {order}")
        runs[death] = start_on_two_hosts(folder, plugin, model), folder
    return runs


@pytest.mark.parametrize("death", DEATHS)
def test_what_ends_a_host_s_rank_ends_the_run_and_is_told_on_the_other(
    deaths: Mapping[str, tuple[subprocess.Popen[bytes], Path]], death: str
) -> None:
    _, expected = DEATHS[death]
    completed = ends(*deaths[death])
    assert completed["one"].code not in (0, None)
    assert completed["two"].code != 0
    for host, words in expected.items():
        assert len(completed[host].messages) == (words is not None), completed
        assert words is None or words in completed[host].messages[0]
