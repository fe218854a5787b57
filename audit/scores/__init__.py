"""Scores of captions: the scan and what belongs to it.

config.py        flags that say how captions are scored
model.py         which model a run has: found, checked, loaded
scan.py          `be-audit scan`: plan, null maps, scan, second look, refine
null_maps.py     what excess is measured against, made before the scan
scan_shard.py    one shard of it: read, score, write, commit
self_check.py    the scorer against the plain formulas, before a long scan
scorer.py        captions to columns, by either scorer
estimate.py      `scan --dry-run`
second_look.py   `scan --second-look`: more noises for the best-scored rows
refine.py        `scan --refine`: trajectories of the best-scored rows
trajectories.py  one shard of trajectories, for refine and confirm
calibrate.py     `be-audit calibrate`: thresholds from clean captions
cut.py           which rows a command takes: by which score, above what
prompt.py        `be-audit score`: one prompt, printed and drawn
"""
