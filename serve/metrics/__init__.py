"""What is measured, defined once: request records in, named numbers with units and formulas out.

    records.py       one request as its client saw it: when it was sent, when each token came, how it ended
    window.py        the steady window, the stretch of a run in which the load was held
    queue.py         an open loop's offered and achieved rate, and whether its queue grew without bound
    statistics.py    percentiles, distributions, the Wilson interval, ratios that may not exist
    catalogue.py     every metric with its tag, unit and formula, and how it is computed from a measured load
    units.py         how numbers are written for people
    result_file.py   results as JSON files, written whole and read strictly
    provenance.py    where a number was made: hardware, versions, commit, command line

Times are nanoseconds inside and milliseconds on screen. A number that cannot be computed is an error, never 0.
"""
