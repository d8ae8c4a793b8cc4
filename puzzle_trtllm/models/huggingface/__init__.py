"""The child in transformers: config, model, loaders, and remote code for those who lack this package.

Importing this module imports neither torch nor transformers; its modules do. `loading` has `register`, `load_child` and
`load_causal_lm`; `remote_code` has `write_remote_code` and needs no torch.
"""
