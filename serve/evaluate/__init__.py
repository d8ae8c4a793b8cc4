"""Accuracy per reasoning effort, measured through the server that is to be deployed.

problems.py   a problem set: JSONL of {"id", "prompt", "answer"}
answers.py    what a model finally said: the final channel of a harmony answer
graders.py    exact, numeric, regex
runner.py     `evaluate`: render, generate, grade -> EvaluationResult
result.py     accuracy with its interval, mean tokens, completions per second, per effort
"""
