"""Stage `build`: derive a child from its parent, fold KV scales, and build engine folders."""
