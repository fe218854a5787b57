"""Verdicts: what was copied, from where, and how sure that is.

confirm.py        `be-audit confirm`: images, matches, null, verdicts
candidates.py     its flags; which captions images are generated of
beside.py         matching while the next images are generated
match_shard.py    one shard of captions: search and compare
compare.py        one generated image against training pictures
crops.py          training pictures as training cut them
null.py           what images look like that copy nothing
confirm_shard.py  verdicts of one shard of candidates
"""
