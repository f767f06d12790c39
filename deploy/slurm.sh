#!/usr/bin/env bash
#SBATCH --job-name=reopold
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@600
#SBATCH --open-mode=append
#
# One run of engine=verl on all nodes of a SLURM job (docs/cluster.md):
#
#   sbatch --nodes=2 --gpus-per-node=8 deploy/slurm.sh RUN recipe=paper_agentic [setting=value ...]
#
# RUN is the run folder, on a file system that all nodes share. The script starts a Ray head on the
# first node and a worker on each other, waits until all have joined, runs the driver on the first node,
# and ends the cluster with it. A driver that fails gets a new cluster and resumes from its newest
# checkpoint, REOPOLD_TRIES times in all (3); exit status 2 (a setting to correct) ends the job at once.
# A lost node ends the whole job; SLURM queues it again (--requeue) and it resumes too. SIGTERM goes to
# the driver, which finishes its step, saves and ends the job; --signal=B: sends it to this script only, 600
# seconds before the end of the time, because the raylets must live until the driver has saved.
#
# Environment: VIRTUAL_ENV is activated where it is set; REOPOLD_GPUS is the number of GPUs per node
# (default: SLURM's), REOPOLD_PORT Ray's port (6379), REOPOLD_WAIT the seconds to wait for nodes (600).
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch [options] $0 RUN setting=value ..." >&2
  exit 2
fi
run=$1
shift
tries=${REOPOLD_TRIES:-3}
port=${REOPOLD_PORT:-6379}
patience=${REOPOLD_WAIT:-600}
gpus=${REOPOLD_GPUS:-${SLURM_GPUS_ON_NODE:?run this with sbatch, with --gpus-per-node}}
cpus=${SLURM_CPUS_ON_NODE:?run this with sbatch}
if [ -n "${VIRTUAL_ENV:-}" ]; then
  # shellcheck disable=SC1091
  . "$VIRTUAL_ENV/bin/activate"
fi

# Without a token anyone who reaches the cluster's ports can run code in it. srun passes both on.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?run this with sbatch}")
head=${nodes[0]}
# The first address: some nodes list several, the first IPv4 one is what the others reach.
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address |
  tr ' ' '\n' | grep -m 1 -E '^[0-9]+(\.[0-9]+){3}$')
address="$ip:$port"
steps=()

stop_cluster() {
  [ ${#steps[@]} -eq 0 ] && return 0
  kill "${steps[@]}" 2>/dev/null || true # srun passes it on to the raylets
  wait "${steps[@]}" 2>/dev/null || true
  steps=()
}
driver=''
trap stop_cluster EXIT
trap '[ -n "$driver" ] || exit 143; kill "$driver" 2>/dev/null || true' TERM
trap 'exit 130' INT

start_raylet() { # NODE, then the arguments of `ray start`
  local node=$1
  shift
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
    ray start "$@" --num-gpus="$gpus" --num-cpus="$cpus" --disable-usage-stats --block &
  steps+=($!)
}

start_cluster() { # called where `set -e` does not hold: every failure is passed on by hand
  start_raylet "$head" --head --node-ip-address="$ip" --port="$port"
  wait_for 1 || return
  local node
  for node in "${nodes[@]:1}"; do
    start_raylet "$node" --address="$address"
  done
  wait_for "${#nodes[@]}"
}

# Waits until all nodes have joined with all GPUs; status 1 if they do not join in time.
waiter='
import sys, time
import ray
address, nodes, gpus, seconds = sys.argv[1], *map(int, sys.argv[2:])
end = time.monotonic() + seconds
while True:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        there = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0) >= gpus]
        if len(there) >= nodes:
            break
        seen = f"{len(there)} of {nodes} nodes have joined"
    except Exception as error:  # no head yet; the last error is printed at the end
        seen = f"no head at {address}: {error}"
    if time.monotonic() > end:
        sys.exit(f"reopold: gave up after {seconds} s: {seen}")
    time.sleep(2)
'
wait_for() { # COUNT
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    timeout $((patience + 60)) python -c "$waiter" "$address" "$1" "$gpus" "$patience"
}

for try in $(seq 1 "$tries"); do
  echo "reopold: attempt $try of $tries on ${#nodes[@]} nodes, Ray at $address"
  status=0
  start_cluster || status=$?
  if [ "$status" -eq 0 ]; then
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
      env RAY_ADDRESS="$address" python -m reopold_agent.train engine=verl "$@" \
      engine.nodes="${#nodes[@]}" engine.gpus_per_node="$gpus" \
      hydra.run.dir="$run" resume=auto &
    driver=$!
    wait "$driver" || status=$?
    while kill -0 "$driver" 2>/dev/null; do # a signal ended `wait`, not the driver
      status=0
      wait "$driver" || status=$?
    done
    driver=''
  fi
  stop_cluster
  case $status in
    0 | 2 | 130 | 143) exit "$status" ;;
  esac
  echo "reopold: the run ended with status $status" >&2
done
exit "$status"
