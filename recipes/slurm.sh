#!/usr/bin/env bash
# Trains on the machines of a SLURM job, and goes on by itself after its time limit or a failure:
#
#   sbatch recipes/slurm.sh recipes/llava15_finetune.toml [section.key=value ...]
#
# The folder of the run must be on a disk that all machines share. Start it from the checkout, in the environment that trains.
# How a start ended stands in RUN/exit.json, because torchrun makes 1 of every code:
#   75, asked for by this script before the time limit   the job is put back into the queue
#   75, asked for by people (touch RUN/STOP, scancel)    it stays stopped; sbatch again to go on
#   1, or nothing at all, as after the loss of a machine back into the queue if a checkpoint was added, MAX_REQUEUES times at most
#   0, 2, 65, 70, 73                                     done, or nothing that another start would mend
#
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# One task per machine: torchrun starts the ranks. USR1 comes to this script alone (B:), 300 seconds before the limit, which must be
# more than faults.grace_seconds of the run. --requeue is for machines that fail: SLURM then starts this script anew.
set -euo pipefail

(($# > 0)) || { echo "usage: sbatch $0 RUN.toml [section.key=value ...]" >&2; exit 2; }
MAX_REQUEUES=${MAX_REQUEUES:-20}
# torchrun kills its ranks so many seconds after it was told to end; more than faults.grace_seconds. Before torch 2.12 it is always 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

RUN=$(python - "$@" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    folder = tomllib.load(file).get("output_dir", "")
for text in sys.argv[2:]:
    key, _, value = text.partition("=")
    folder = value.strip("\"'") if key == "output_dir" else folder
print(folder or sys.exit(f"{sys.argv[1]} names no output_dir"))
PYTHON
)

newest() { # the number of the newest checkpoint, 0 without one
    local path number found=0
    for path in "$RUN"/checkpoint-*; do
        number=${path##*-}
        if [[ $number =~ ^[0-9]+$ ]] && ((number > found)); then found=$number; fi
    done
    echo "$found"
}

code() { # that the run ended with; 1 where it left no word
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"])' "$RUN/exit.json" 2>/dev/null || echo 1
}

requeue() {
    echo "slurm.sh: $1: back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
}

mkdir -p "$RUN"
rm -f "$RUN/exit.json" # or a launcher that fails at once would be judged by the start before
asked=
trap 'asked=yes; touch "$RUN/STOP"' USR1
before=$(newest)
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# The store of the ranks is on the first machine; another id and port for every job and start, so that none meets ranks of another.
# Signals that a task is sent by name (scancel, pre-emption) are passed on to the ranks, which save and end.
srun --kill-on-bad-exit=1 --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=2 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="${hosts[0]}:$((20000 + SLURM_JOB_ID % 20000))" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m trainer.main --cfg "$@" &
# A signal ends `wait` and not what it waits for.
while kill -0 $! 2>/dev/null; do wait $! || true; done

ended=$(code)
case $ended in
    75) if [[ $asked ]]; then requeue "stopped before the time limit"; fi ;;
    1)
        if (($(newest) <= before)); then
            echo "slurm.sh: failed without a new checkpoint: not started again" >&2
        elif ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
            echo "slurm.sh: failed, and was started again $SLURM_RESTART_COUNT times: MAX_REQUEUES=$MAX_REQUEUES" >&2
        else
            requeue "failed after checkpoint-$(newest)"
        fi
        ;;
esac
exit "$ended"
