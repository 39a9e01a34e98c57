"""With how many workers a run took its steps: what it takes to know which bags are behind it.

`workers.json` in the run folder has an entry for each number of workers the run was started or resumed with:
[{"step": 0, "num_workers": 1}, {"step": 40, "num_workers": 2}]. The plan of a step follows from these alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finecap_ray.bags.plan import RunPlan
from finecap_ray.bags.stream import plan_run
from finecap_ray.config import RlSettings

HISTORY_FILE = "workers.json"


def plan_from(run_dir: str | Path, manifest: dict[str, Any], settings: RlSettings, seed: int, step: int) -> RunPlan:
    """The plan of a run that goes on at `step` (0: a new run), and notes the workers it goes on with.

    Its steps are numbered from where the number of workers changed last. Raises as `plan_run`.
    """
    path = Path(run_dir) / HISTORY_FILE
    history = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    history = [entry for entry in history if entry["step"] < step]  # what came after the checkpoint is done again
    if not history or history[-1]["num_workers"] != settings.num_workers:
        history.append({"step": step if history else 0, "num_workers": settings.num_workers})
    plan = None
    for entry in history:
        state = None if plan is None else plan.state_dict(entry["step"] - plan.first_step)
        workers = {"num_workers": entry["num_workers"]}
        plan = plan_run(manifest, settings.model_copy(update=workers), seed, state)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(history), encoding="utf-8")
    return plan
