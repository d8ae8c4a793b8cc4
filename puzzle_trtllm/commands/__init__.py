"""The command line, one module a group of commands: parse, call the documented Python function, print.

front.py     what all commands share: errors become one line and an exit code, `--debug`, lists of values
output.py    tables for people on stdout, one JSON object for programs
The others hold the commands. Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""
