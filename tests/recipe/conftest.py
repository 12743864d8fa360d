"""A Slurm of one host for tests: munge, slurmctld and slurmd on loopback, nothing under /etc."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """
ClusterName=icetransfer-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
# short-lived credentials: a requeued job is held as long as the old ones are valid
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1,sched_interval=2
KillWait=2
InactiveLimit=0
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=1:00:00 State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(folder: Path) -> None:
    """Ends the daemons by the process ids that they wrote."""
    for name in ("slurmd", "slurmctld", "munged"):
        with suppress(OSError, ValueError):
            pid = int((folder / f"{name}.pid").read_text())
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running Slurm with four CPUs; the environment in which its commands are called."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here: on Debian, apt-get install --no-install-recommends "
            f"munge slurmctld slurmd slurm-client"
        )
    if os.geteuid() != 0:
        pytest.skip("a Slurm for tests is started by root alone")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(
        CONF.format(
            host=host, folder=folder, ctld_port=free_port(), slurmd_port=free_port()
        ).lstrip()
    )
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": path}
    try:
        for command in (
            ["munged", f"--key-file={key}", f"--socket={folder}/munge.socket", "--force",
             f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
             f"--seed-file={folder}/munge.seed"],
            ["slurmctld", "-c", "-f", str(conf)],
            ["slurmd", "-f", str(conf)],
        ):  # fmt: skip
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            command = ["sinfo", "--noheader", "--format=%T"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.stdout.strip() == "idle":
                break
            assert time.monotonic() < deadline, f"Slurm does not come up: {done.stderr}"
            time.sleep(0.2)
        yield environment
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=30)
        time.sleep(1)
    finally:
        stop(folder)
