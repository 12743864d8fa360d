"""The report of a sweep, as pages, tables and data: `python -m icetransfer.report`."""
