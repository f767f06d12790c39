"""deploy/ and docs/cluster.md: their claims hold, and the SLURM script runs a cluster."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from running import composed

from reopold_agent.config import TrainConfig
from reopold_agent.train.verl.records import to_row
from reopold_agent.types import EncodedImage, StopReason, Trajectory

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "deploy" / "slurm.sh"
MANIFEST = ROOT / "deploy" / "kuberay.yaml"
CLUSTER = ROOT / "docs" / "cluster.md"

SRUN = """#!/usr/bin/env bash
# A stand-in: every node is this machine. Writes down where each step would run.
place=
while [ $# -gt 0 ]; do
  case $1 in
    --nodelist=*) place=${1#--nodelist=} ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
[ "$1" = hostname ] && { echo "::1 127.0.0.1"; exit 0; }
words="$*"
echo "$place: ${words:0:300}" | head -1 >> "$STEPS"
exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\n[ \"$1 $2\" = 'show hostnames' ] && printf 'node-a\\nnode-b\\n'\n"


def overrides(command: str) -> list[str]:
    """Returns the settings that a documented command passes to ``reopold_agent.train``."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert "reopold_agent.train" in words, command
    return words[words.index("reopold_agent.train") + 1 :]


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def slurm(tmp_path: Path, **programs: str) -> tuple[dict[str, str], Path]:
    """A job's environment with stand-ins for SLURM's programs; and where steps are written down."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
        program(bin_, name, text)
    steps = tmp_path / "steps"
    steps.touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    path = f"{bin_}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    job = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "4"}
    return {**own, **job, "PATH": path, "STEPS": str(steps), "REOPOLD_PORT": str(port)}, steps


def submit(environment: dict[str, str], *words: str, seconds: float = 60) -> Any:
    return subprocess.run(
        ["bash", str(SLURM), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


# The manifest


def test_the_manifest_asks_for_the_nodes_and_gpus_that_the_run_uses() -> None:
    job = yaml.safe_load(MANIFEST.read_text("utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    config, _ = composed(*overrides(job["spec"]["entrypoint"]))
    assert config.engine.name == "verl"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == config.engine.nodes
    (container,) = group["template"]["spec"]["containers"]
    gpus = str(config.engine.gpus_per_node)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert group["rayStartParams"]["num-gpus"] == gpus
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert job["spec"]["backoffLimit"] >= 1
    assert config.resume == "auto"


def test_every_pod_shares_the_run_folder_and_has_room_for_the_object_store() -> None:
    spec = yaml.safe_load(MANIFEST.read_text("utf-8"))["spec"]
    cluster = spec["rayClusterSpec"]
    (folder,) = re.findall(r"hydra\.run\.dir=(\S+)", spec["entrypoint"])
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "persistentVolumeClaim" in mounts[f"/{Path(folder).parts[1]}"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["requests"] == container["resources"]["limits"]


# The SLURM script


def test_the_script_parses_and_shellcheck_is_content() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.is_file() else shutil.which("shellcheck")
    if found is None:
        pytest.skip('no shellcheck: pip install -e ".[test]"')
    done = subprocess.run([found, str(SLURM)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


RAY = """#!/usr/bin/env bash
trap 'echo ended >> "$STEPS"; kill $!; exit 0' TERM
sleep 60 > /dev/null 2>&1 &
wait
"""
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && { sleep 0.5; exit 0; }  # by then the raylets are up
n=$(cat "$STEPS.tries" 2>/dev/null || echo 0)
echo $((n + 1)) > "$STEPS.tries"
[ "$n" -lt "${FAILURES:-0}" ] && exit "${STATUS:-1}"
[ -n "${TRAINS:-}" ] || exit 0
trap 'kill $!; sleep 0.5; echo saved >> "$STEPS"; exit 143' TERM
sleep 60 > /dev/null 2>&1 &
echo training >> "$STEPS"
wait
"""


def test_head_then_workers_then_driver_and_an_end_to_all_of_them(tmp_path: Path) -> None:
    environment, steps = slurm(tmp_path, ray=RAY, python=PYTHON)
    done = submit(environment, "runs/x", "recipe=paper_agentic", "seed=3")
    assert done.returncode == 0, done.stderr
    port = environment["REOPOLD_PORT"]
    lines = steps.read_text().splitlines()
    started = [line for line in lines if "ray start" in line]
    assert started[0].startswith("node-a: ray start --head --node-ip-address=127.0.0.1")
    assert started[1].startswith(f"node-b: ray start --address=127.0.0.1:{port}")
    assert all("--num-gpus=8" in line for line in started)
    assert len(started) == lines.count("ended") == 2
    (driver,) = [line for line in lines if "reopold_agent.train" in line]
    assert driver.startswith(f"node-a: env RAY_ADDRESS=127.0.0.1:{port} python -m")
    words = overrides(driver)
    config, _ = composed(*words)
    assert (config.engine.name, config.engine.nodes, config.engine.gpus_per_node) == ("verl", 2, 8)
    assert (config.seed, config.resume, config.batch.prompts) == (3, "auto", 128)
    assert "hydra.run.dir=runs/x" in words


@pytest.mark.parametrize(
    ("failures", "status", "tried", "ends"),
    [(1, 1, 2, 0), (9, 1, 3, 1), (9, 2, 1, 2)],
    ids=["recovers", "gives up after three tries", "a setting to mend is not tried again"],
)
def test_a_failed_driver_gets_a_new_cluster(
    tmp_path: Path, failures: int, status: int, tried: int, ends: int
) -> None:
    environment, steps = slurm(tmp_path, ray=RAY, python=PYTHON)
    environment.update(FAILURES=str(failures), STATUS=str(status))
    done = submit(environment, "runs/x", "env=math")
    assert done.returncode == ends, done.stderr
    lines = steps.read_text().splitlines()
    assert sum("reopold_agent.train" in line for line in lines) == tried
    assert sum("--head" in line for line in lines) == tried
    assert lines.count("ended") == 2 * tried


def test_the_driver_saves_before_a_signal_ends_the_cluster(tmp_path: Path) -> None:
    environment, steps = slurm(tmp_path, ray=RAY, python=PYTHON)
    environment["TRAINS"] = "yes"
    job = subprocess.Popen(["bash", str(SLURM), "runs/x", "env=math"], env=environment)
    deadline = time.monotonic() + 60
    while "training" not in steps.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=60) == 143
    lines = steps.read_text().splitlines()
    assert lines[-3:] == ["saved", "ended", "ended"]
    assert sum("reopold_agent.train" in line for line in lines) == 1


def test_outside_of_slurm_it_says_how_to_call_it(tmp_path: Path) -> None:
    environment, _ = slurm(tmp_path)
    assert "usage" in submit(environment).stderr
    del environment["SLURM_JOB_NODELIST"]
    done = submit(environment, "runs/x", "env=math")
    assert done.returncode != 0
    assert "sbatch" in done.stderr


DRIVER = """
import os, sys
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
nodes = [node for node in ray.nodes() if node["Alive"]]
print("NODES", len(nodes), "GPUS", int(ray.cluster_resources()["GPU"]), flush=True)
"""


@pytest.mark.full_env
@pytest.mark.slow
def test_two_raylets_make_a_cluster_and_leave_nothing(tmp_path: Path) -> None:
    """The real `ray`, with this machine as both nodes; a driver that only counts them."""
    pytest.importorskip("ray", reason="needs the full environment")
    python = f'#!/usr/bin/env bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
    python += f"exec {sys.executable} {tmp_path / 'driver.py'}\n"
    (tmp_path / "driver.py").write_text(DRIVER)
    environment, _ = slurm(tmp_path, python=python)
    environment.update(REOPOLD_TRIES="1", REOPOLD_WAIT="120", RAY_TMPDIR=f"/tmp/r{os.getpid()}")
    try:
        done = submit(environment, "runs/x", "env=math", seconds=240)
    finally:
        left = processes_with(f"/tmp/r{os.getpid()}")
        for _ in range(20):
            if not left:
                break
            time.sleep(0.5)
            left = processes_with(f"/tmp/r{os.getpid()}")
        shutil.rmtree(f"/tmp/r{os.getpid()}", ignore_errors=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "NODES 2 GPUS 16" in done.stdout
    assert not left


def processes_with(words: str) -> list[str]:
    """Command lines of running processes that contain these words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended meanwhile
            if words in line:
                found.append(line[:200])
    return found


# The document


def commands() -> list[str]:
    """The training commands of docs/cluster.md."""
    blocks = re.findall(r"```\n(.*?)```", CLUSTER.read_text("utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if "reopold_agent.train" in line or "slurm.sh" in line]


def test_the_documents_commands_compose() -> None:
    found = commands()
    assert len(found) >= 3
    for command in found:
        words = shlex.split(command, comments=True)
        at = next(i for i, w in enumerate(words) if w == "reopold_agent.train" or "slurm.sh" in w)
        given = words[at + 1 :]
        if "slurm.sh" in words[at]:
            given = ["engine=verl", *given[1:]]
        config: TrainConfig = composed(*given)[0]
        assert config.engine.name == "verl", command


def trajectory(pictures: int, side: int) -> Trajectory:
    rng = np.random.default_rng(0)
    grid = (1, side // 14, side // 14)
    images = [
        EncodedImage(rng.integers(0, 256, (side, side, 3), np.uint8), grid, (side // 28) ** 2)
        for _ in range(pictures)
    ]
    zeros = np.zeros(8, dtype=np.float32)
    return Trajectory(
        task_id="t",
        index=0,
        sample=0,
        ids=np.arange(8),
        loss_mask=np.arange(8) > 3,
        logp=zeros,
        entropy=zeros,
        images=images,
        turns=[],
        prompt_length=4,
        reward=0.0,
        success=False,
        stop_reason=StopReason.ANSWER,
        info={},
        seconds=0.0,
        teacher_logp=zeros,
    )


@pytest.mark.parametrize("side", [504, 1008])
def test_a_row_carries_three_bytes_per_pixel(side: int) -> None:
    """The document's formula: uint8 pixels once each, not the float patches (24 bytes a pixel)."""
    size = len(pickle.dumps(to_row(trajectory(5, side))))
    assert 5 * 3 * side**2 <= size < 5 * 3 * side**2 * 1.02


def test_the_documents_figures_follow_from_its_formula() -> None:
    text = CLUSTER.read_text("utf-8")
    rows = re.findall(r"\| (\d+) x (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", text)
    assert len(rows) == 5
    for prompts, samples, pictures, pixels, rows_gb, patches_gb in rows:
        bytes_ = int(prompts) * int(samples) * int(pictures) * int(pixels.replace(",", "")) * 3
        assert float(rows_gb) == round(bytes_ / 1e9, 1)
        assert float(patches_gb) == round(8 * bytes_ / 1e9, 1)
