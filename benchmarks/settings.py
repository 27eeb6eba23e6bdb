"""The settings the benchmarks compare; docs/decisions/0013-profiles.md says how they were found."""

from __future__ import annotations

from typing import Any

from bimask.defences.ims.config import PurifyConfig

# Naive's are the best of `benchmarks.tune`. Fast's are variants by hand, judged on `val`: for BadNets
# of a point that its search found; for Blended nothing of its search held the goal.
NAIVE = {"patience": None, "step_size": None}
TUNED: dict[str, dict[str, PurifyConfig]] = {
    "badnets": {
        "naive": PurifyConfig(
            **NAIVE,
            budget=0.222,
            initial_selection=0.9611,
            initialise_rounds=6,
            inner_steps=18,
            mask_lr=0.1347,
            minimise_rounds=3,
            select_rounds=21,
            selection_weight=1.861,
            sharpness=11.8897,
        ),
        "fast": PurifyConfig.profile("fast"),
    },
    "blended": {
        "naive": PurifyConfig(
            **NAIVE,
            budget=0.3571,
            initial_selection=0.8931,
            initialise_rounds=11,
            inner_steps=15,
            mask_lr=0.0967,
            minimise_rounds=28,
            select_rounds=23,
            selection_weight=5.2173,
            sharpness=13.6352,
        ),
        "fast": PurifyConfig.profile(
            "fast",
            budget=0.17,
            warm_start=1.0,
            universal=0.5,
            clean_weight=1.2,
            selection_weight=1.2,
            mask_lr=0.1,
            sharpness=10.0,
            initial_selection=0.94,
            initialise_rounds=20,
            minimise_rounds=30,
            select_rounds=50,
        ),
    },
    "cifar": {
        "fast": PurifyConfig.profile(
            "fast",
            budget=0.5,
            inner_steps=2,
            warm_start=0.5,
            universal=1.0,
            clean_weight=2.5,
            selection_weight=2.0,
            mask_lr=0.1,
            sharpness=10.0,
            initial_selection=0.92,
            initialise_rounds=20,
            minimise_rounds=20,
            select_rounds=80,
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
    "no universal perturbation": {"universal": 0.0},
    "universal for all": {"universal": 1.0},
    "clean weight 1": {"clean_weight": 1.0},
    "last masks kept": {"keep": "last"},
    "last masks kept, cosine": {"keep": "last", "mask_lr_schedule": "cosine"},
    "AdamW inner steps": {"inner_optimizer": "adamw"},
    "momentum 0.5": {"inner_momentum": 0.5},
    "no warm start": {"warm_start": 0.0},
    "warm start": {"warm_start": 1.0},
    "one inner step": {"inner_steps": 1},
    "four inner steps": {"inner_steps": 4},
    "inner steps grow from 1": {"inner_steps_at_start": 1, "inner_steps": 4},
    "last pass reused": {"reuse_last_pass": True},
    "half the batch early": {"early_batch_size": 50},
    "no shifted images": {"shift": 0},
    "paper's loss form": {"loss_form": "paper"},
    "straight-through masks": {"mask_estimator": "straight_through"},
    "images not clipped": {"clip_images": False},
}
