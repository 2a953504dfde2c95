#!/bin/bash
# lorica train on 2 nodes of 8 GPUs, which goes on where it was after each time limit or pre-emption:
#   sbatch slurm.sh --model_name_or_path my-model --train_file new.jsonl --output_dir updated --save_steps 500
# All of what is named has to be on a file system that both nodes see. To be adapted: partition, account, environment.
# --shutdown_timeout is an option of torchrun 2.13.
#SBATCH --job-name=lorica
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

out=""
for ((i = 1; i <= $#; i++)); do
  [[ ${!i} == --output_dir ]] && ((i < $#)) && { next=$((i + 1)); out=${!next}; }
  [[ ${!i} == --output_dir=* ]] && out=${!i#*=}
done
[[ -n $out ]] || { echo "slurm.sh: give --output_dir" >&2; exit 2; }

checkpoint() { compgen -G "$out/checkpoint-*" > /dev/null; }

# lorica refuses to resume where there is no checkpoint, which is how the first start and an early end look.
resume=()
checkpoint && resume=(--resume_from_checkpoint true)

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PID_FILE=$(mktemp)
trap 'rm -f "$PID_FILE"' EXIT
export PID_FILE  # of the torchrun on this node, the first; a signal to one process stops all after the same step
# torchrun hands SIGTERM on once and kills after --shutdown_timeout: what Slurm leaves, less a little to end.
srun --kill-on-bad-exit=0 bash -c '[[ $SLURM_PROCID == 0 ]] && echo $$ > "$PID_FILE"; exec "$@"' - torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --shutdown_timeout 110 \
  --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_backend c10d --rdzv_endpoint "$first:${MASTER_PORT:-29500}" \
  -m lorica train "$@" "${resume[@]}" &
step=$!

# B:TERM comes to this script alone, and goes on once: a second SIGTERM ends lorica without a checkpoint.
stopped=""
trap 'stopped=yes; kill -TERM "$(< "$PID_FILE")"' TERM
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do  # the signal has ended the wait
  wait "$step"
  status=$?
done

if [[ -n $stopped && $status -ne 0 ]] && checkpoint; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
