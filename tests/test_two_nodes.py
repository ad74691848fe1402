"""Two hosts with two ranks each compute what one host with four ranks computes."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from tests.two_nodes import numbers

TIMEOUT_S = 240
ROOT = Path(__file__).parent.parent


class Hosts:
    """Two hosts on this machine: a prefix that runs a command on each, and their addresses."""

    def __init__(
        self, prefixes: list[list[str]], addresses: list[str], interfaces: list[str]
    ) -> None:
        self.prefixes = prefixes
        self.addresses = addresses
        self.interfaces = interfaces


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def _namespaces() -> Iterator[Hosts]:
    """Two network namespaces joined by a cable; nothing else is reachable from them."""
    tag = f"{os.getpid() % 100000:05d}"
    names = [f"bnr{tag}{end}" for end in "ab"]
    addresses = ["10.99.0.1", "10.99.0.2"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", names[0], "netns", names[0], "type", "veth",
            "peer", "name", names[1], "netns", names[1])  # fmt: skip
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", name, "up")
        yield Hosts([["ip", "netns", "exec", name] for name in names], addresses, names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@contextlib.contextmanager
def _loopback() -> Iterator[Hosts]:
    """Two agents on one host, with loopback addresses of their own."""
    yield Hosts([[], []], ["127.0.0.2", "127.0.0.3"], ["lo", "lo"])


def _can_make_namespaces() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with _namespaces():
            return True
    except (subprocess.SubprocessError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _run_on(hosts: Hosts, folder: Path) -> list[list[torch.Tensor]]:
    port = _free_port()
    agents = []
    for node in range(2):
        command = [
            *hosts.prefixes[node], sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2",
            "--master-addr", hosts.addresses[0], "--master-port", str(port),
            "--local-addr", hosts.addresses[node], "-m", "tests.two_nodes", str(folder),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": hosts.interfaces[node],
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        agents.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [agent.communicate(timeout=TIMEOUT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            # Asked to end, an agent ends its ranks too; killed, it would leave them behind.
            agent.terminate()
            try:
                agent.wait(timeout=30)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
    for node, (agent, output) in enumerate(zip(agents, outputs, strict=True)):
        assert agent.returncode == 0, f"node {node} failed:\n{output}"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("kind", ["namespaces", "loopback"])
def test_two_hosts_with_two_ranks_are_one_host_with_four(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    """Host a: rank 0, rank 1  --cable--  host b: rank 2, rank 3     =     ranks 0 1 2 3."""
    if kind == "namespaces" and not _can_make_namespaces():
        pytest.skip("network namespaces need root and the ip command; loopback is tested")
    with (_namespaces if kind == "namespaces" else _loopback)() as hosts:
        two_hosts = _run_on(hosts, tmp_path)
    for rank, one_host in enumerate(ranks.run(numbers, 4)):
        assert len(two_hosts[rank]) == len(one_host)
        for ours, theirs in zip(two_hosts[rank], one_host, strict=True):
            # Sends and gathers only move bits, so nothing may differ.
            assert torch.equal(ours, theirs)
