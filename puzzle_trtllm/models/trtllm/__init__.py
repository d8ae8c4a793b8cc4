"""The child for TensorRT-LLM's PyTorch backend, as an out-of-tree model.

    upstream.py    the table: every upstream name, signature and attribute relied on, per release line, as data
    symbols.py     finds a symbol of that table in the installed TensorRT-LLM, and checks rows against it
    layers.py      what each layer decides: expert count, window, router kernel; which layouts are refused
    names.py       module of the model <-> tensors of the checkpoint
    experts.py     the expert tensors of one layer as TensorRT-LLM's fused MoE modules take them
    loading.py     fills every module once, accounts for every tensor
    modeling.py    the thin part: `GptOssPuzzleForCausalLM`, registered when the module is imported

Only modeling.py imports tensorrt_llm. No folder of this project is called tensorrt_llm: workers put folders of ours on
sys.path, and such a name would shadow the real one.
"""
