"""Stage `calibration`: what is learned from data, expert importance and FP8 KV scales."""
