"""What a scan imports: loaded once by the server that tests/command.py forks its processes from."""

# ruff: noqa: E402, F401

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"
gc.disable()

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
import transformers.models.clip.modeling_clip

import audit.cli.commands
import audit.engines.worker
import audit.scores.scan_shard
import pipelines
import tests.faults.inject

gc.freeze()
gc.enable()
