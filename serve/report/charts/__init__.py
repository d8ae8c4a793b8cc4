"""The report's pictures, drawn as SVG text: no plotting library, no fonts or scripts from elsewhere.

Colours are CSS classes, defined on the page for light and for dark, so one drawing serves both. `s0`, `s1`, ... are the
baselines in their order and `child` is the child, in every picture. Hovering shows exact numbers (SVG's own <title>).

    throughput.py   tokens per second, rounds and range, without the memory cap beside it
    memory.py       what the given memory holds: weights, then sequences
    frontier.py     accuracy against request rate over reasoning efforts
    length_budget.py  how much longer answers may be before the speedup is gone
    layer_map.py    experts and attention window of every layer
"""
