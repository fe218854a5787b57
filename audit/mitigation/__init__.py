"""Mitigation: prompts that copy are changed until they do not, and the result is audited again.

config.py          flags that a run and a single prompt share
mitigate.py        `be-audit mitigate RUN`
mitigate_shard.py  one shard of it: trigger, optimise, generate, audit, commit
target.py          the default target: the same loss of clean captions
prompt.py          `be-audit mitigate --prompt TEXT`
"""
