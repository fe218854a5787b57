"""What a scan imports: loaded once by the server that tests/command.py forks its processes from."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401

import pipelines  # noqa: F401
import tests.faults.inject  # noqa: F401
