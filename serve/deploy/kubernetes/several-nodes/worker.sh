#!/bin/bash
# Process 1 of a group's worker: an SSH server through which the leader starts this node's ranks, for its key alone.
set -euo pipefail

keys=${KEYS:-/etc/puzzle-ssh}
folder=$(mktemp -d)
mkdir -p /run/sshd
install -m 600 "$keys/private" "$folder/host"
# The key runs commands, and opens neither terminals nor tunnels.
echo "restrict $(cat "$keys/public")" > "$folder/authorized"
# Sessions start with an empty environment; mpirun's own helper is found by these two.
cat > "$folder/config" <<CONFIG
Port ${SSH_PORT:-2222}
HostKey $folder/host
AuthorizedKeysFile $folder/authorized
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv "PATH=$PATH" "LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
CONFIG
exec /usr/sbin/sshd -D -e -f "$folder/config"
