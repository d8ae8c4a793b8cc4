"""The main job told as one story, and the small trained model that it is told with.

`problems` is the task (long additions at three reasoning efforts), `abacus/` the shipped parent model with its data,
`training/` the script that made it. Importing this package imports nothing.
"""
