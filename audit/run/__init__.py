"""The run folder: what an audit was asked to do, its stages, and what they have written so far.

schema.py  every column a run writes
run.py     run.json and the plan: the run itself
claim.py   one planner a folder
stage.py   a pass over rows of a run, sharded and committed; every stage there is
read.py    committed rows, with duplicates and refinement resolved, for every reader
select.py  the best-scored captions
status.py  how far every stage is
workers.py which workers stand still, and why
verify.py  whether everything is there and whole
"""
