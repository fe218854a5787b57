"""What everything else stands on: errors, flags, folders, commits, columns, facts, words.

errors.py       what a user did wrong, and what ends a job
options.py      command-line flags made from configuration classes
facts.py        our own JSON files, read and checked as dataclasses
fingerprint.py  digests, and the difference between two fingerprints in words
storage.py      a folder anywhere fsspec reaches
listings.py     S3's listings, read fast
tree.py         what lies below a folder, every file once
publish.py      a file of a local disk, whole under its name or not at all
seal.py         size and hash of files that results rest on
commits.py      the commit protocol: what makes a shard done
committed.py    a commit, and many of them as columns
checkpoint.py   a cache of many commits in one file
identity.py     which columns name a picture or a caption
ours.py         which files a run, an index or a report wrote
devices.py      which devices a command works on
progress.py     a bar on a terminal, lines elsewhere
garbage.py      how often a process of ours looks for garbage
stopping.py     SIGTERM and Ctrl-C
log.py          what every worker does, as JSON lines
text.py         durations, sizes and tables for people
"""
