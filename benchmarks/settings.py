"""The settings the benchmarks compare, found by studies of equal size; see benchmarks/README.md."""

from __future__ import annotations

from typing import Any

from bimask.config import PurifyConfig

# victim -> program -> settings
TUNED: dict[str, dict[str, PurifyConfig]] = {
    "badnets": {
        "naive": PurifyConfig(patience=None),
        "fast": PurifyConfig.profile("fast"),
    },
    "blended": {
        "naive": PurifyConfig(patience=None),
        "fast": PurifyConfig.profile("fast"),
    },
    "cifar": {"fast": PurifyConfig.profile("fast")},
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
    "no momentum": {"inner_momentum": 0.0},
    "no warm start": {"warm_start": 0.0},
    "half warm start": {"warm_start": 0.5},
    "warm start": {"warm_start": 1.0},
    "one inner step": {"inner_steps": 1},
    "inner steps grow from 1": {"inner_steps_at_start": 1},
    "last pass reused": {"reuse_last_pass": True},
    "half the batch early": {"early_batch_size": 50},
    "full batch early": {"early_batch_size": None},
    "constant rate": {"mask_lr_schedule": "constant"},
    "paper's loss form": {"loss_form": "paper"},
    "straight-through masks": {"mask_estimator": "straight_through"},
    "images not clipped": {"clip_images": False},
}
