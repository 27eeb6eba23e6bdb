"""The settings the benchmarks compare, found by studies of equal size; see benchmarks/README.md."""

from __future__ import annotations

from typing import Any

from bimask.config import PurifyConfig

# Bounds of the studies, the same trials for all: budget 0.1-0.5, mask_lr 0.03-0.2, selection_weight
# 0.3-3, sharpness 6-20, initial_selection 0.85-0.97, rounds of each stage; naive has 4-20 AdamW steps,
# fast 1-4 sign steps and the warm start. Chosen by the seconds to the goal on `val`.
NAIVE = {"patience": None, "step_size": None}
TUNED: dict[str, dict[str, PurifyConfig]] = {
    "badnets": {
        "naive": PurifyConfig(
            **NAIVE,
            budget=0.35,
            inner_steps=17,
            mask_lr=0.156,
            selection_weight=2.86,
            sharpness=15.7,
            initial_selection=0.905,
            initialise_rounds=9,
            minimise_rounds=40,
            select_rounds=28,
        ),
        "fast": PurifyConfig.profile("fast"),
    },
    "blended": {
        "fast": PurifyConfig.profile(
            "fast",
            budget=0.15,
            inner_steps=3,
            warm_start=1.0,
            mask_lr=0.1,
            selection_weight=1.2,
            sharpness=10.0,
            initial_selection=0.94,
            initialise_rounds=20,
            minimise_rounds=40,
            select_rounds=50,
            shift=0,
        ),
    },
    "cifar": {
        "fast": PurifyConfig.profile(
            "fast",
            budget=0.166,
            inner_steps=1,
            warm_start=0.5,
            mask_lr=0.06,
            selection_weight=1.115,
            sharpness=10.2,
            initial_selection=0.968,
            initialise_rounds=8,
            minimise_rounds=6,
            select_rounds=51,
        ),
    },
}

# one lever of `fast` the other way
LEVERS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "contiguous": {"memory_format": "contiguous"},
    "batch norm not folded": {"fold_batch_norm": False},
    "torch.compile": {"compile": True},
    "one batch a pass": {"images_per_pass": "batch"},
    "AdamW inner steps": {"inner_optimizer": "adamw"},
    "momentum 0.5": {"inner_momentum": 0.5},
    "no warm start": {"warm_start": 0.0},
    "warm start": {"warm_start": 1.0},
    "one inner step": {"inner_steps": 1},
    "inner steps grow from 1": {"inner_steps_at_start": 1},
    "last pass reused": {"reuse_last_pass": True},
    "half the batch early": {"early_batch_size": 50},
    "no shifted images": {"shift": 0},
    "constant rate": {"mask_lr_schedule": "constant"},
    "paper's loss form": {"loss_form": "paper"},
    "straight-through masks": {"mask_estimator": "straight_through"},
    "images not clipped": {"clip_images": False},
}
