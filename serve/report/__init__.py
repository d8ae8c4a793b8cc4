"""The report: measured engines side by side, as a table, as report.json and as a page.

measurement.py   EngineMeasurement: all that is known of one engine, as a file
assemble.py      an engine folder + bench rounds + an evaluation -> EngineMeasurement
compare.py       a child against a baseline: speedup, request rate, retention
notes.py         what a reader must know before believing it
summary.py       the content shared by all outputs, and the headline in words
document.py, table.py, page.py, charts/   report.json, the terminal, report.html
"""

from puzzle_trtllm.serve.report.assemble import assemble_measurement
from puzzle_trtllm.serve.report.files import load_measurements
from puzzle_trtllm.serve.report.maker import make_report
from puzzle_trtllm.serve.report.measurement import EngineMeasurement

__all__ = ["EngineMeasurement", "assemble_measurement", "load_measurements", "make_report"]
