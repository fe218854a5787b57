"""Who runs shards, and where. Knows no stage: a job is opened by the dotted name it is given.

config.py       the flags of every command whose shards go to an engine
job.py          what a job is, its three steps, and how a worker opens one
overlap.py      steps of several shards beside each other, so that the device does not wait
failures.py     rows that fail: all together, else one by one; how many a shard may have
retries.py      shards that fail: the one policy of tries, replacement and retirement of workers
local.py        this process, or one owned process a device
processes.py    such a process as its parent sees it
keep.py         what a command keeps between stages: models, processes
worker.py       what such a process does
ray.py          one actor a device of a Ray cluster
ray_cluster.py  how the cluster is joined, and when it is gone
rank.py         which machine of several this is
launch.py       a stage's shards to the engine that was asked for
"""
