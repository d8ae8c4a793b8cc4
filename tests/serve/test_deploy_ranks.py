"""The scripts of the LeaderWorkerSet, run: two network namespaces stand for two pods, with real sshd, ssh and mpirun.

Only trtllm-llmapi-launch and the engine's server are stand-ins: the first does to rank 0 what NVIDIA's does (the server
in the background without the job's variables, the rank itself a worker), the second prints and ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "serve" / "deploy" / "kubernetes" / "several-nodes"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
NEEDED = ("ip", "unshare", "ssh", "ssh-keygen", "mpirun")

LAUNCH = """#!/bin/bash
export TLLM_SPAWN_PROXY_PROCESS=1
if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then
  ( for name in $(compgen -e); do case $name in OMPI_* | PMIX_* | PMI_*) unset "$name" ;; esac; done
    "$@"; touch "$ENGINE/stop" ) &
fi
echo "rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE at $(hostname): $TRTLLM_WINDOW_SIZE_SHARES $OTHER"
exec python -c '
import os, time
from mpi4py import MPI
while not MPI.COMM_WORLD.bcast(os.path.exists(os.environ["ENGINE"] + "/stop") if MPI.COMM_WORLD.rank == 0 else None):
    time.sleep(0.1)
'
"""
SERVER = """#!/bin/sh
echo "server $*: rank ${OMPI_COMM_WORLD_RANK-of no job}, proxy $TLLM_SPAWN_PROXY_PROCESS"
sleep 1
exit $(cat "$ENGINE/code")
"""


@pytest.fixture
def pods(tmp_path):
    """Two named pods with one address each; yields (command prefix of the leader, of the worker)."""
    missing = [tool for tool in NEEDED if shutil.which(tool, path=PATH) is None]
    if os.geteuid() or missing or not Path("/usr/sbin/sshd").exists():
        pytest.skip(f"needs root, sshd and {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root or sshd'}")
    names = {f"pz{os.getpid()}l": ("10.99.7.1", "child-0"), f"pz{os.getpid()}w": ("10.99.7.2", "child-0-1")}
    hosts = "127.0.0.1 localhost\n" + "".join(f"{ip} {host}.child.default\n" for ip, host in names.values())
    leader, worker = names
    with contextlib.ExitStack() as undo:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
                pytest.skip("needs the right to make network namespaces")
            undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            undo.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text(hosts)
        run("ip", "link", "add", leader, "netns", leader, "type", "veth", "peer", "name", worker, "netns", worker)
        for name, (ip, _) in names.items():
            run("ip", "-n", name, "addr", "add", f"{ip}/24", "dev", name)
            for link in ("lo", name):
                run("ip", "-n", name, "link", "set", link, "up")
        yield tuple(
            ["ip", "netns", "exec", name, "unshare", "-u", "bash", "-c", f'hostname {host}; exec bash "$0"']
            for name, (_, host) in names.items()
        )


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("server_code", [0, 1])
def test_a_leader_starts_ranks_on_its_worker_and_all_end_with_the_server(pods, tmp_path, server_code):
    leader, worker = pods
    keys, engine, tools = (tmp_path / name for name in ("keys", "engine", "tools"))
    for folder in (keys, engine / "launch", tools):
        folder.mkdir(parents=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / "private"))
    (keys / "private.pub").rename(keys / "public")
    (engine / "launch" / "environment.sh").write_text(
        "export TRTLLM_WINDOW_SIZE_SHARES=0.25,0.75\nexport OTHER='a b'\n"
    )
    (engine / "code").write_text(str(server_code))
    for file, text in ((tools / "trtllm-llmapi-launch", LAUNCH), (engine / "launch" / "tritonserver.sh", SERVER)):
        file.write_text(text)
        file.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{PATH}",
        **{"ENGINE": str(engine), "KEYS": str(keys), "GPUS_PER_NODE": "2", "TLLM_X": "1"},
        **{"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "child-0.child.default"},
    }
    with subprocess.Popen([*worker, str(SCRIPTS / "worker.sh")], env=environment, stderr=subprocess.DEVNULL) as sshd:
        try:
            ended = subprocess.run(
                [*leader, str(SCRIPTS / "leader.sh")],
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        finally:
            sshd.terminate()
    lines = sorted(ended.stdout.splitlines())
    ranks = [f"rank {r} of 4 at {'child-0' if r < 2 else 'child-0-1'}: 0.25,0.75 a b" for r in range(4)]
    assert lines == [*ranks, "server --host 0.0.0.0: rank of no job, proxy 1"], ended.stderr
    assert (ended.returncode == 0) == (server_code == 0)
