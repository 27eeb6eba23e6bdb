"""The search: Optuna proposes, Ray Tune runs, every trial ends in one record.

A trial is Optuna's. What Ray calls a trial is a group of them, `trials_per_actor` or fewer, which one
actor runs at once; its configuration and its final report hold a list, one entry a member.

The only package that imports ray or optuna. Facts of the stack that shape it:

- Ray's own OptunaSearch turns a two-objective study into a single-objective one when TuneConfig names
  a metric, and leaves a trial RUNNING for ever when a metric is NaN or missing. `ParetoSearch` speaks
  to Optuna through its public ask-and-tell interface: two directions, or it does not start, and
  every trial is told COMPLETE with finite values or FAIL.
- A resume is a new run of Tune on the same storage: `Tuner.restore` takes its state from pickles, loses
  up to ten seconds of it, and leaves trials RUNNING that Tune does not know.
- A trial that ends early never reaches the front: only a final report carries objectives.
- Trials of a group are asked for before the first of them is told, so TPE must keep its distance from
  those still running: `constant_liar`, the default since Optuna 5, for several objectives since 3.5.
- GP knows of COMPLETE and RUNNING trials alone, so it is told of a stopped one when the search closes.
- Actors are reused, so each trial sets its own threads and works on copies.
"""

import os

# Ray reads its environment at import, and hands it on to its actors.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours: study/search/interrupts.py
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1e9")  # a resume reads no file of Ray's
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # records are ours
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU trial leaves GPUs visible
# Tune ends the whole study at the error of an actor that Ray's memory monitor killed. One that the
# kernel kills (Ray's workers first: their oom_score_adj is 1000) is a process that died: run again.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
# Actors started from here keep the memory they free: glibc hands every large tensor back to the kernel
# otherwise, and faulting its pages in again costs a trial on a CPU a tenth of its time.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))

from importlib import import_module
from typing import TYPE_CHECKING, Any

from study.spec.config import PAPER

if TYPE_CHECKING:
    from study.search.actor import trainable
    from study.search.cluster import check_resources, release_workers, start_ray, stop_ray
    from study.search.confirm import run_confirmation
    from study.search.driver import run_search
    from study.search.embedded.liveness import ray_gone
    from study.search.embedded.own_ray import set_last_words
    from study.search.pareto_search import ParetoSearch, first_points
    from study.search.preflight import check_nodes
    from study.search.tasks import LostTaskError, run_tasks
    from study.search.victims import SharedVictims
else:
    _PLACES = {
        "trainable": "actor",
        **dict.fromkeys(("check_resources", "release_workers", "start_ray", "stop_ray"), "cluster"),
        "run_confirmation": "confirm",
        "run_search": "driver",
        "ray_gone": "embedded.liveness",
        "set_last_words": "embedded.own_ray",
        **dict.fromkeys(("ParetoSearch", "first_points"), "pareto_search"),
        "check_nodes": "preflight",
        **dict.fromkeys(("LostTaskError", "run_tasks"), "tasks"),
        "SharedVictims": "victims",
    }

    def __getattr__(name: str) -> Any:
        """Each actor imports this package, and needs neither Optuna nor MLflow, which take a second."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        globals()[name] = found
        return found


__all__ = [
    "PAPER",
    "LostTaskError",
    "ParetoSearch",
    "SharedVictims",
    "check_nodes",
    "check_resources",
    "first_points",
    "ray_gone",
    "release_workers",
    "run_confirmation",
    "run_search",
    "run_tasks",
    "set_last_words",
    "start_ray",
    "stop_ray",
    "trainable",
]
