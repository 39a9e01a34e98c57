"""Keeps vllm out of the trainer's process: TRL imports it wherever it is installed, which takes seconds and memory.

Captions come from samplers in processes of their own. Import this before trl.
"""

import trl.import_utils as found

found.is_vllm_available = lambda min_version=None: False
