"""What is measured: `python -m tests.benchmarks` (or `make bench`).

`workloads/` holds what is asked, as data made by `make_workloads.py`; `peers/` one file for each server asked the
same; `load.py` asks over HTTP; `report.py` writes what came out.
"""
