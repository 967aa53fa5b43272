"""Studies: many runs from one file, in one table, with a report.

A study file describes the runs (`study_file`, `expansion`). Each is an ordinary run folder. Steps
that several runs have in common are computed once (`plan`), in processes of this machine or on Ray
(`local_workers`, `ray_workers`). One SQLite file has a row for each run (`table`).
"""
