#!/bin/bash
# Process 1 of a group's leader: one MPI rank a GPU, here and on the group's workers. trtllm-llmapi-launch makes rank 0
# run the server (rank0.sh) and every rank, 0 included, a worker of TensorRT-LLM.
set -euo pipefail

leader=${LWS_LEADER_ADDRESS:?set by LeaderWorkerSet}
gpus=${GPUS_PER_NODE:?}
engine=${ENGINE:-/engine}
keys=${KEYS:-/etc/puzzle-ssh}
port=${SSH_PORT:-2222}

# The workers' host key is the same key pair (worker.sh), so neither side talks to a stranger.
folder=$(mktemp -d)
install -m 600 "$keys/private" "$folder/key"
echo "puzzle $(cut -d ' ' -f 1,2 "$keys/public")" > "$folder/hosts"
cat > "$folder/config" <<CONFIG
Host *
  Port $port
  IdentityFile $folder/key
  IdentitiesOnly yes
  UserKnownHostsFile $folder/hosts
  HostKeyAlias puzzle
  StrictHostKeyChecking yes
  LogLevel ERROR
CONFIG
# Open MPI 4 and 5 call the same setting differently.
export OMPI_MCA_plm_rsh_agent="ssh -F $folder/config" PRTE_MCA_plm_ssh_agent="ssh -F $folder/config"

# Worker i of the leader NAME.SUBDOMAIN.NAMESPACE is NAME-i.SUBDOMAIN.NAMESPACE.
hosts=localhost:$gpus
for ((i = 1; i < LWS_GROUP_SIZE; i++)); do
  worker=${leader%%.*}-$i.${leader#*.}
  echo "waiting for $worker" >&2
  until ssh -F "$folder/config" -o ConnectTimeout=5 "$worker" true; do sleep 2; done
  hosts+=,$worker:$gpus
done

# Ranks on other nodes inherit nothing: what the engine needs, and the settings of libraries, is passed on by name.
. "$engine/launch/environment.sh"
passed=()
for name in $(compgen -e); do
  case $name in
    PATH | LD_LIBRARY_PATH | PYTHONPATH | NCCL_* | UCX_* | TRTLLM_* | TLLM_*) passed+=(-x "$name") ;;
    *) if grep -q "^export $name=" "$engine/launch/environment.sh"; then passed+=(-x "$name"); fi ;;
  esac
done

export PUZZLE_MPIRUN=$$
exec mpirun --allow-run-as-root -n $((gpus * LWS_GROUP_SIZE)) --host "$hosts" --map-by "ppr:$gpus:node" --bind-to none \
  "${passed[@]}" trtllm-llmapi-launch bash "$(dirname "$0")/rank0.sh"
