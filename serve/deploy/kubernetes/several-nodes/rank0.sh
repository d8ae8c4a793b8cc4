#!/bin/bash
# What rank 0 runs under trtllm-llmapi-launch. A server that ends by itself (its engine died) ends all ranks, by way of
# mpirun: then the pod ends, and LeaderWorkerSet makes the whole group anew.
"${ENGINE:-/engine}/launch/tritonserver.sh" --host 0.0.0.0 || kill -TERM "$PUZZLE_MPIRUN"
