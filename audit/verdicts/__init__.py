"""Verdicts: what was copied, from where, and how sure that is.

confirm.py        `be-audit confirm`: candidates, trajectories, null, verdicts
confirm_shard.py  verdicts of one shard of candidates
compare.py        one generated image against training pictures
null.py           the same comparison between different training pictures
"""
